//! What is kept of a device when its VM is saved: a version, the registers of its transport, its queues, and what the device
//! itself has to say.
//!
//! The types here and in the devices' files are for this only, so that a device can change and its saved form stays. Nothing
//! under way is in them: a device brings that to an end first ([`crate::device::VirtioDevice::quiesce`]). What belongs to
//! the host (files, taps, sockets, counters) is not in them either: a device is restored into one that was made like it.
//!
//! A saved state is not believed: it may come from anywhere, so that all of it is checked as if a guest had written it.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::device::Broken;

/// The version of every type that is saved.
const VERSION: u16 = 1;
/// The longest saved state in bytes: that of a file system has the paths that its guest knows.
pub(crate) const STATE_MAX: usize = 16 << 20;

/// Why a device was not saved or restored.
#[derive(Debug, Error)]
pub enum StateError {
    /// It cannot be.
    #[error("a device of type {0} cannot be saved")]
    Unsupported(u32),
    /// What it has under way does not end.
    #[error("the device is busy: {operations} operations are under way")]
    Busy {
        /// How many.
        operations: usize,
    },
    /// Its driver broke it while what was under way was brought to an end.
    #[error("the driver broke the device")]
    Broken(#[from] Broken),
    /// It is in use already.
    #[error("only a device that has no driver yet can be restored")]
    InUse,
    /// It is too long.
    #[error("the state is {length} bytes long: {STATE_MAX} are the most")]
    TooLong {
        /// Its length.
        length: usize,
    },
    /// It is no state at all, or it has something behind it.
    #[error("the state of the {0} is not one")]
    Syntax(&'static str),
    /// It is of another version.
    #[error("the state has version {0}: {VERSION} is known")]
    Version(u16),
    /// It is of another device.
    #[error("the state is of a device of type {found} with {found_queues} queues, and not {own} with {own_queues}")]
    OtherDevice {
        /// The type in it.
        found: u32,
        /// How many queues are in it.
        found_queues: usize,
        /// The device's type.
        own: u32,
        /// How many queues it has.
        own_queues: usize,
    },
    /// What the driver has of the host's files is not kept, or not found.
    #[error("the session of the file system cannot go on elsewhere")]
    Session(#[source] fuse::SessionError),
    /// No driver could have brought the device there.
    #[error("the state cannot be: {what} is {value:#x}")]
    Impossible {
        /// What is wrong.
        what: &'static str,
        /// What it is.
        value: u64,
    },
}

/// Says that no driver could have brought a device to this.
pub(crate) fn impossible(what: &'static str, value: impl Into<u64>) -> StateError {
    StateError::Impossible { what, value: value.into() }
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DeviceState {
    pub(crate) device_type: u32,
    pub(crate) status: u32,
    pub(crate) driver_features: u64,
    /// Which 32 of the features are selected: the device's, the driver's.
    pub(crate) selected_features: (u32, u32),
    pub(crate) selected_queue: u32,
    pub(crate) generation: u32,
    pub(crate) interrupt: u32,
    pub(crate) queues: Vec<QueueState>,
    /// What the device itself keeps, as it encodes it.
    pub(crate) own: Vec<u8>,
}

/// A queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct QueueState {
    pub(crate) size: u16,
    pub(crate) ready: bool,
    pub(crate) next_available: u16,
    pub(crate) next_used: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

/// What is left in a device's buckets ([`crate::limit`]); owed below zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LimiterState {
    pub(crate) bytes: Option<i64>,
    pub(crate) operations: Option<i64>,
}

impl From<fuse::SessionError> for StateError {
    fn from(error: fuse::SessionError) -> Self {
        match error {
            fuse::SessionError::Waiting(operations) => Self::Busy { operations },
            fuse::SessionError::Impossible { what, value } => Self::Impossible { what, value },
            error => Self::Session(error),
        }
    }
}

/// Encodes a saved device.
pub(crate) fn seal(state: &DeviceState) -> Vec<u8> {
    let mut bytes = VERSION.to_le_bytes().to_vec();
    bytes.extend(encode(state));
    bytes
}

/// Decodes a saved device.
///
/// # Errors
/// [`StateError`] says what is wrong with it; its values are not checked.
pub(crate) fn open(bytes: &[u8]) -> Result<DeviceState, StateError> {
    if bytes.len() > STATE_MAX {
        return Err(StateError::TooLong { length: bytes.len() });
    }
    // First of all, since nothing is known of what other versions look like.
    let (version, rest) = bytes.split_first_chunk().ok_or(StateError::Syntax("device"))?;
    let version = u16::from_le_bytes(*version);
    if version != VERSION {
        return Err(StateError::Version(version));
    }
    decode("device", rest)
}

/// Encodes what a device keeps.
pub(crate) fn encode<T: Serialize>(state: &T) -> Vec<u8> {
    // Fails for lengths that are not known before, which these types do not have.
    postcard::to_stdvec(state).unwrap_or_default()
}

/// Decodes what a device keeps.
///
/// # Errors
/// [`StateError::Syntax`].
pub(crate) fn decode<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, StateError> {
    match postcard::take_from_bytes(bytes) {
        Ok((state, [])) => Ok(state),
        _ => Err(StateError::Syntax(what)),
    }
}
