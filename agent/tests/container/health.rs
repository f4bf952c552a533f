//! Health checks, on their own schedule.

use std::time::{Duration, Instant};

use protocol::container::{ContainerSpec, HealthCheck};
use protocol::report::{HEALTH_OUTPUT_MAX, Health, HealthStatus};
use protocol::{Call, FromAgent};

use crate::host::{Host, PATIENCE};
use crate::image::{Image, script};

const MS: u64 = 1000;

/// A container that sleeps, and is well when a script says so.
fn checked(image: &Image, what: &str, retries: u32) -> ContainerSpec {
    let check = HealthCheck {
        args: ["sh", "-c", what].map(str::to_owned).to_vec(),
        interval_us: 20 * MS,
        timeout_us: 10_000 * MS,
        start_period_us: 0,
        start_interval_us: 5 * MS,
        retries,
    };
    ContainerSpec { health_check: Some(check), ..image.spec("c", &["sleep", "1000"]) }
}

fn health(host: &mut Host) -> Health {
    match host.next() {
        FromAgent::Health { container, health } if container == "c" => health,
        other => panic!("unexpected message {other:?}"),
    }
}

/// Kills the container, whatever its health is meanwhile.
fn kill(host: &mut Host) {
    host.signal("c", 9, true).unwrap();
    loop {
        match host.next() {
            FromAgent::Health { .. } => {}
            FromAgent::Exited { status, .. } => break assert_eq!(status.code, 137),
            other => panic!("unexpected message {other:?}"),
        }
    }
    assert_eq!(host.children(), 0);
}

#[test]
fn it_becomes_unhealthy_and_healthy_again() {
    let image = Image::new();
    let mut host = Host::new();
    let mut spec = checked(&image, "id -u; echo $HOME; pwd; [ -e /tmp/well ] || exit 3", 2);
    spec.process.user = "app".into();
    spec.process.working_directory = "/home/app".into();
    host.launch(&spec).unwrap();
    let output = "1000\n/home/app\n/home/app\n".to_owned();
    let of = |status, failing_streak, exit_code| Health {
        status,
        failing_streak,
        exit_code: Some(exit_code),
        output: output.clone(),
    };
    assert_eq!(health(&mut host), of(HealthStatus::Starting, 1, 3));
    assert_eq!(health(&mut host), of(HealthStatus::Unhealthy, 2, 3));
    assert_eq!(health(&mut host), of(HealthStatus::Unhealthy, 3, 3));
    host.exec("c", "p", &script("echo > /tmp/well")).unwrap();
    loop {
        match host.next() {
            FromAgent::Health { health, .. } if health.status == HealthStatus::Healthy => {
                break assert_eq!(health, of(HealthStatus::Healthy, 0, 0));
            }
            FromAgent::Health { .. } | FromAgent::ProcessExited { code: 0, .. } => {}
            other => panic!("unexpected message {other:?}"),
        }
    }
    kill(&mut host);
}

#[test]
fn a_run_that_takes_too_long_is_killed() {
    let image = Image::new();
    let mut host = Host::new();
    let mut spec = checked(&image, "echo begun; sleep 1000; echo never", 1);
    spec.health_check.as_mut().unwrap().timeout_us = 200 * MS;
    host.launch(&spec).unwrap();
    let result = health(&mut host);
    assert_eq!((result.status, result.failing_streak, result.exit_code), (HealthStatus::Unhealthy, 1, None));
    assert_eq!(result.output, "Health check exceeded timeout (200ms): begun\n");
    // What the shell had started is gone, too.
    health(&mut host);
    match host.call(Call::Processes { container: "c".into() }).unwrap() {
        protocol::Answer::Processes(list) => assert!(list.len() <= 3, "{list:?}"),
        other => panic!("unexpected answer {other:?}"),
    }
    kill(&mut host);
}

#[test]
fn what_cannot_be_executed_is_told() {
    let image = Image::new();
    let mut host = Host::new();
    let mut spec = checked(&image, "", 1);
    spec.health_check.as_mut().unwrap().args = vec!["nope".into()];
    host.launch(&spec).unwrap();
    let result = health(&mut host);
    assert_eq!((result.status, result.exit_code), (HealthStatus::Unhealthy, None));
    assert_eq!(result.output, "exec: \"nope\": executable file not found in $PATH");
    kill(&mut host);
}

#[test]
fn output_is_bounded_and_who_holds_the_pipe_is_not_waited_for() {
    let image = Image::new();
    let mut host = Host::new();
    let spec = checked(&image, "sleep 1000 & head -c 3000000 /dev/zero | tr '\\0' x; echo end >&2", 1);
    host.launch(&spec).unwrap();
    let result = health(&mut host);
    assert_eq!((result.status, result.exit_code), (HealthStatus::Healthy, Some(0)));
    assert_eq!(result.output, "x".repeat(HEALTH_OUTPUT_MAX));
    kill(&mut host);
}

#[test]
fn failures_of_the_start_do_not_count() {
    let image = Image::new();
    let mut host = Host::new();
    let mut spec = checked(&image, "exit 1", 1);
    let check = spec.health_check.as_mut().unwrap();
    (check.start_period_us, check.interval_us) = (400 * MS, 100 * MS);
    host.launch(&spec).unwrap();
    let begun = Instant::now();
    let mut starting = 0;
    while health(&mut host).status == HealthStatus::Starting {
        starting += 1;
    }
    assert!(starting >= 3 && begun.elapsed() > Duration::from_millis(250), "{starting} in {:?}", begun.elapsed());
    kill(&mut host);
}

#[test]
fn a_container_that_stands_still_is_not_checked() {
    let image = Image::new();
    let mut host = Host::new();
    host.launch(&checked(&image, "true", 1)).unwrap();
    assert_eq!(health(&mut host).status, HealthStatus::Healthy);
    let freeze = |frozen| Call::Freeze { container: "c".into(), frozen };
    host.call(freeze(true)).unwrap();
    host.forget_early();
    host.control.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(protocol::frame::read::<FromAgent>(&mut host.control, protocol::frame::MAX_FROM_AGENT).is_err());
    host.control.set_read_timeout(Some(PATIENCE)).unwrap();
    host.call(freeze(false)).unwrap();
    assert_eq!(health(&mut host).status, HealthStatus::Healthy);
    kill(&mut host);
}

#[test]
fn the_agent_sleeps_between_two_runs() {
    let image = Image::new();
    let mut host = Host::new();
    let mut spec = checked(&image, "true", 1);
    spec.health_check.as_mut().unwrap().interval_us = 3_600_000 * MS;
    host.launch(&spec).unwrap();
    let switches = |host: &Host| {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", host.agent())).unwrap();
        let count = |status: String| {
            let line =
                status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap().to_owned();
            line.trim().parse::<u64>().unwrap()
        };
        tasks.map(|task| count(std::fs::read_to_string(task.unwrap().path().join("status")).unwrap())).sum::<u64>()
    };
    std::thread::sleep(Duration::from_millis(300));
    let before = switches(&host);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(switches(&host), before);
    kill(&mut host);
}

#[test]
fn an_end_during_a_run_is_an_end_and_no_failure() {
    let image = Image::new();
    let mut host = Host::new();
    let mut spec = checked(&image, "echo x > /tmp/begun; sleep 1000", 1);
    spec.process.args =
        ["sh", "-c", "until [ -e /tmp/begun ]; do sleep 0.01; done; exit 6"].map(str::to_owned).to_vec();
    for _ in 0..5 {
        host.launch(&spec).unwrap();
        assert_eq!(host.exited("c").code, 6);
        assert_eq!(host.children(), 0);
    }
}
