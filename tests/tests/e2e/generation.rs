//! The VM generation ID, as the guest's kernel takes it.

use serde_json::{Value, json};
use tests::sandbox::{Detached, Sandbox};
use tests::until;

use crate::api::{curl, json_of};
use crate::memory::changing;

fn generation(sandbox: &Sandbox, pod: &Detached<'_>, method: &str) -> (u16, Value) {
    json_of(curl(sandbox, pod, &["--request", method], "/v1/vm/generation"))
}

#[test]
fn a_guest_hears_that_it_is_in_another_vm() {
    let sandbox = Sandbox::new();
    // Its kernel tells of it quietly.
    let pattern = r#"("command_line": *)""(.*"generation_id": *)false"#;
    let monitor = changing(&sandbox, pattern, r#"\1"loglevel=6"\2true"#);
    let pod = sandbox.detached_by(&monitor, "pod", &["--cpus", "2"], "busybox", &["sleep", "1000"]);
    let get = |path| curl(&sandbox, &pod, &[], path).1;
    let post = |path| curl(&sandbox, &pod, &["--request", "POST"], path).0;
    let renewed = || {
        let (code, answer) = generation(&sandbox, &pod, "POST");
        assert_eq!(code, 200, "{answer}");
        answer
    };
    let heard = |times: usize| {
        let heard = || get("/v1/vm/console").matches("crng reseeded due to virtual machine fork").count();
        until("what the guest's kernel says of it", || (heard() == times).then_some(()));
    };

    let (code, first) = generation(&sandbox, &pod, "GET");
    assert_eq!((code, first["id"].as_str().map(str::len)), (200, Some(32)), "{first}");
    heard(0);
    let second = renewed();
    assert_ne!(first, second);
    assert_eq!(generation(&sandbox, &pod, "GET"), (200, second.clone()));
    heard(1);
    // One that stands still hears it when it goes on.
    assert_eq!(post("/v1/vm/pause"), 204);
    assert_ne!(renewed(), second);
    assert_eq!(post("/v1/vm/resume"), 204);
    heard(2);
    let changes = r#"cofferdam_device_changes{device="generation_id""#;
    let metrics = get("/v1/metrics");
    let line = metrics.lines().find(|line| line.starts_with(changes));
    assert!(line.is_some_and(|line| line.ends_with(" 2")), "{metrics}");
    // All else is found where that is.
    assert_eq!(pod.verb("exec", &[], &["nproc"]).end().succeeded(), "2\n");
}

#[test]
fn a_guest_that_is_not_told_does_not_hear_of_it() {
    let sandbox = Sandbox::new();
    let pod = sandbox.detached("pod", &[], "busybox", &["sleep", "1000"]);
    for method in ["GET", "POST"] {
        let (code, problem) = generation(&sandbox, &pod, method);
        assert_eq!((code, &problem["type"]), (404, &json!("no-such-resource")));
        assert!(problem["detail"].as_str().unwrap().contains("`generation_id`"), "{problem}");
    }
}
