//! Limits of how much a device moves: a token bucket for bytes and one for operations.
//!
//! An operation may begin while there is anything left in both buckets, and takes what it needs even if that is more than
//! there is: what is owed is waited for before the next one. So no operation is too large for a bucket, and the rate over
//! time is the one asked for. Nothing polls: a device that has to wait hears of its timer.

use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use crate::device::{Trigger, Watch};
use crate::state::LimiterState;

/// The size of a bucket and how fast it fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// How many tokens it holds, at least 1: what may be used at once after a rest. A token is a byte or an operation.
    pub size: u64,
    /// How long it takes from empty to full, at least a nanosecond.
    pub refill: Duration,
    /// What it has above its size in the beginning, once.
    pub burst: u64,
}

#[derive(Debug)]
struct Bucket {
    rate: Rate,
    /// Below zero: what is owed.
    tokens: i128,
    filled: Instant,
}

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, tokens: i128::from(rate.size) + i128::from(rate.burst), filled: now }
    }

    fn size(&self) -> i128 {
        i128::from(self.rate.size.clamp(1, i64::MAX as u64))
    }

    fn refill_ns(&self) -> i128 {
        i128::try_from(self.rate.refill.as_nanos()).unwrap_or(i128::MAX).clamp(1, i128::from(i64::MAX))
    }

    /// Adds what has flowed in, up to the bucket's size. What is above it, of the burst, stays.
    fn fill(&mut self, now: Instant) {
        let elapsed = i128::try_from(now.saturating_duration_since(self.filled).as_nanos()).unwrap_or(i128::MAX);
        // Both factors are below 2^63.
        let earned = elapsed.min(i128::from(i64::MAX)) * self.size() / self.refill_ns();
        if earned >= self.size().saturating_sub(self.tokens) {
            (self.tokens, self.filled) = (self.tokens.max(self.size()), now);
            return;
        }
        self.tokens += earned;
        // Only the time that was paid for: what is left over counts for the next token.
        let paid = earned.saturating_mul(self.refill_ns()) / self.size();
        let paid = Duration::from_nanos(u64::try_from(paid).unwrap_or(u64::MAX));
        self.filled = self.filled.checked_add(paid).map_or(now, |filled| filled.min(now));
    }

    /// How long until there is something in it; zero when there is.
    fn wait(&self) -> Duration {
        if self.tokens > 0 {
            return Duration::ZERO;
        }
        let missing = (1 - self.tokens).saturating_mul(self.refill_ns());
        let ns = (missing / self.size()).saturating_add(1);
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
    }
}

/// The limits of one device.
#[derive(Debug)]
pub struct Limiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    timer: TimerFd,
    waiting: bool,
    /// How often the device had to wait.
    throttled: u64,
}

impl Limiter {
    /// Full buckets; `None` means no limit.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new(bytes: Option<Rate>, operations: Option<Rate>) -> io::Result<Self> {
        let now = Instant::now();
        let bucket = |rate: Option<Rate>| rate.map(|rate| Bucket::new(rate, now));
        let timer = TimerFd::new()?;
        Ok(Self { bytes: bucket(bytes), operations: bucket(operations), timer, waiting: false, throttled: 0 })
    }

    /// Whether an operation may begin now. If not, the timer will tell: until then there is no use in asking.
    pub fn admit(&mut self) -> bool {
        if self.waiting {
            return false;
        }
        let now = Instant::now();
        let mut wait = Duration::ZERO;
        for bucket in [&mut self.bytes, &mut self.operations].into_iter().flatten() {
            bucket.fill(now);
            wait = wait.max(bucket.wait());
        }
        if wait.is_zero() {
            return true;
        }
        self.throttled += 1;
        // A timer that cannot be set must not stop the device for ever.
        self.waiting = self.timer.reset(wait, None).is_ok();
        !self.waiting
    }

    /// Whether an operation may begin now, for a device that may have no limits.
    pub fn admits(limiter: &mut Option<Self>) -> bool {
        limiter.as_mut().is_none_or(Self::admit)
    }

    /// Counts an operation that moved so many bytes.
    pub fn charge(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.tokens -= i128::from(bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.tokens -= 1;
        }
    }

    /// The timer, for [`VirtioDevice::watched`](crate::device::VirtioDevice::watched). Heard of once each time: a device that
    /// was reset while it waited would otherwise be told of its timer for ever.
    pub fn watch(&self) -> Watch {
        Watch { descriptor: self.descriptor(), trigger: Trigger::Readable }
    }

    /// The timer's descriptor: readable when the wait is over.
    pub fn descriptor(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// To be called when the timer's descriptor is readable. Does no harm when it is not: the next [`Limiter::admit`] then
    /// sets the timer again.
    pub fn wake(&mut self) {
        if self.waiting {
            // Not by reading it, which would wait for a timer that is not due.
            let _ = self.timer.clear();
            self.waiting = false;
        }
    }

    /// Forgets that the device waits, for when its driver resets it: the timer may tell while nobody listens. What was used
    /// stays used. Makes no system call.
    pub fn reset(&mut self) {
        self.waiting = false;
    }

    /// What is left, for a device that may have no limits.
    pub(crate) fn save(limiter: &Option<Self>) -> Option<LimiterState> {
        // Far more than is ever owed at once.
        let tokens = |bucket: &Bucket| bucket.tokens.clamp(i64::MIN.into(), i64::MAX.into()) as i64;
        let limiter = limiter.as_ref()?;
        Some(LimiterState {
            bytes: limiter.bytes.as_ref().map(tokens),
            operations: limiter.operations.as_ref().map(tokens),
        })
    }

    /// Takes over what was left, as far as the same is limited: how much is for whoever made the device, and no bucket has
    /// more than that.
    pub(crate) fn restore(limiter: &mut Option<Self>, state: Option<LimiterState>) {
        let (Some(limiter), Some(state)) = (limiter, state) else { return };
        for (bucket, tokens) in [(&mut limiter.bytes, state.bytes), (&mut limiter.operations, state.operations)] {
            if let (Some(bucket), Some(tokens)) = (bucket, tokens) {
                bucket.tokens = i128::from(tokens).min(bucket.size() + i128::from(bucket.rate.burst));
            }
        }
    }

    /// Lifts the limits, for what is left to do once the guest has ended.
    pub fn lift(&mut self) {
        (self.bytes, self.operations, self.waiting) = (None, None, false);
    }

    /// How often the device had to wait.
    pub fn throttled(&self) -> u64 {
        self.throttled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate { size: 1000, refill: Duration::from_secs(1), burst: 500 };

    fn bucket() -> (Bucket, Instant) {
        let now = Instant::now();
        (Bucket::new(RATE, now), now)
    }

    #[test]
    fn a_burst_is_had_once() {
        let (mut bucket, now) = bucket();
        bucket.tokens -= 1500;
        bucket.fill(now + Duration::from_secs(100));
        assert_eq!(bucket.tokens, 1000);
    }

    #[test]
    fn what_is_owed_is_waited_for() {
        let (mut bucket, now) = bucket();
        bucket.tokens -= 3500;
        assert_eq!(bucket.wait(), Duration::from_millis(2001) + Duration::from_nanos(1));
        bucket.fill(now + bucket.wait());
        assert_eq!((bucket.tokens, bucket.wait()), (1, Duration::ZERO));
    }

    #[test]
    fn time_in_pieces_too_small_for_a_token_is_not_lost() {
        let (mut bucket, mut now) = bucket();
        bucket.tokens = -1500;
        for _ in 0..8000 {
            now += Duration::from_micros(300);
            bucket.fill(now);
        }
        assert_eq!(bucket.tokens, 900);
    }

    #[test]
    fn extreme_rates_do_not_overflow() {
        for rate in [
            Rate { size: u64::MAX, refill: Duration::from_nanos(1), burst: u64::MAX },
            Rate { size: 1, refill: Duration::MAX, burst: 0 },
            Rate { size: 0, refill: Duration::ZERO, burst: 0 },
        ] {
            let now = Instant::now();
            let mut bucket = Bucket::new(rate, now);
            bucket.tokens -= i128::from(u64::MAX) * 4;
            bucket.fill(now + Duration::from_secs(1 << 40));
            bucket.wait();
        }
    }

    #[test]
    fn a_limiter_that_is_empty_wakes_its_device() {
        let rate = Rate { size: 1, refill: Duration::from_millis(300), burst: 0 };
        let mut limiter = Limiter::new(None, Some(rate)).unwrap();
        assert!(limiter.admit());
        limiter.charge(1 << 40);
        assert!(!limiter.admit());
        assert_eq!(limiter.throttled(), 1);
        limiter.timer.wait().unwrap();
        limiter.wake();
        assert!(limiter.admit());
    }

    #[test]
    fn a_limiter_that_is_woken_early_waits_on_and_one_that_is_lifted_does_not() {
        let rate = Rate { size: 1, refill: Duration::from_secs(3600), burst: 0 };
        let mut limiter = Limiter::new(Some(rate), None).unwrap();
        limiter.charge(1);
        assert!(!limiter.admit());
        limiter.wake();
        assert!(!limiter.admit());
        limiter.reset();
        assert!(!limiter.admit());
        assert_eq!(limiter.throttled(), 3);
        limiter.lift();
        assert!(limiter.admit());
    }
}
