//! The REST API of a VM, as programs use it: with curl, over the socket in its state directory.

use serde_json::{Value, json};
use tests::sandbox::{Detached, Sandbox};

/// Asks with curl, and gives the status code and the answer.
pub(crate) fn curl(sandbox: &Sandbox, container: &Detached<'_>, arguments: &[&str], path: &str) -> (u16, String) {
    let socket = format!("{}/api.sock", container.inspect("state_directory"));
    let url = format!("http://cofferdam{path}");
    let given = ["--silent", "--show-error", "--write-out", "\n%{http_code}", "--unix-socket", &socket];
    let answer = sandbox.program("curl", given.iter().chain(arguments).copied().chain([url.as_str()])).end();
    assert_eq!(answer.code(), 0, "{answer:?}, the container's state is {}", container.inspect("state"));
    let (body, code) = answer.succeeded().rsplit_once('\n').unwrap();
    (code.parse().unwrap(), body.to_owned())
}

pub(crate) fn json_of((code, body): (u16, String)) -> (u16, Value) {
    (code, serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body}")))
}

#[test]
fn a_vm_tells_what_it_is() {
    let sandbox = Sandbox::new();
    let pod = sandbox.detached("pod", &["--cpus", "2"], "busybox", &["sleep", "1000"]);
    let (code, vm) = json_of(curl(&sandbox, &pod, &[], "/v1/vm"));
    assert_eq!((code, &vm["state"], &vm["vcpus"]), (200, &json!("running"), &json!(2)), "{vm}");
    assert!(vm["boot"]["agent_ready_ns"].as_u64() > vm["boot"]["vm_created_ns"].as_u64(), "{vm}");
    let (code, document) = json_of(curl(&sandbox, &pod, &[], "/openapi.json"));
    assert_eq!((code, &document["openapi"]), (200, &json!("3.1.0")));
    let (code, metrics) = curl(&sandbox, &pod, &[], "/v1/metrics");
    assert!(code == 200 && metrics.contains("# TYPE"), "{metrics}");
    let resident = metrics.lines().find_map(|line| line.strip_prefix("cofferdam_monitor_resident_bytes "));
    assert!(resident.is_some_and(|bytes| bytes.parse::<u64>().unwrap() > 1 << 20), "{metrics}");
    let (code, console) = curl(&sandbox, &pod, &[], "/v1/vm/console");
    assert_eq!(code, 200, "{console}");
}

#[test]
fn a_vm_pauses_whole() {
    let sandbox = Sandbox::new();
    let pod = sandbox.detached("pod", &[], "busybox", &["sh", "-c", "while :; do echo tick; sleep 0.1; done"]);
    let post = |path| curl(&sandbox, &pod, &["--request", "POST"], path).0;
    assert_eq!(post("/v1/vm/pause"), 204);
    assert_eq!(json_of(curl(&sandbox, &pod, &[], "/v1/vm")).1["state"], "paused");
    assert_eq!(post("/v1/vm/resume"), 204);
    assert_eq!(pod.verb("exec", &[], &["echo", "again"]).end().succeeded(), "again\n");
}

#[test]
fn a_vm_uses_fewer_vcpus_for_a_while() {
    let sandbox = Sandbox::new();
    let pod = sandbox.detached("pod", &["--cpus", "2"], "busybox", &["sleep", "1000"]);
    let resize = |vcpus: u8| {
        let body = json!({"vcpus": vcpus}).to_string();
        json_of(curl(&sandbox, &pod, &["--request", "PATCH", "--json", &body], "/v1/vm"))
    };
    for vcpus in [1, 2] {
        let (code, vm) = resize(vcpus);
        assert_eq!((code, &vm["vcpus"], &vm["vcpus_max"]), (200, &json!(vcpus), &json!(2)), "{vm}");
        assert_eq!(pod.verb("exec", &[], &["nproc"]).end().succeeded(), format!("{vcpus}\n"));
    }
    for vcpus in [0, 3] {
        let (code, problem) = resize(vcpus);
        assert_eq!((code, &problem["type"]), (400, &json!("invalid-request")), "{problem}");
    }
}

#[test]
fn problems_have_a_type_and_name_the_field() {
    let sandbox = Sandbox::new();
    let pod = sandbox.detached("pod", &[], "busybox", &["sleep", "1000"]);
    let id = pod.inspect("id");
    let containers = format!("/v1/containers/{id}");
    let body = ["--json", r#"{"signal": 15, "sginal": 9}"#];
    for (arguments, path, status, kind, part) in [
        (&[][..], "/v1/nothing", 404, "no-such-resource", "/v1/nothing"),
        (&[], "/v1/containers/none", 404, "no-such-container", "none"),
        (&["--request", "PUT"], "/v1/vm", 405, "method-not-allowed", "PUT"),
        (&body, &format!("{containers}/kill"), 400, "invalid-request", "sginal"),
        (&["--json", r#"{"signal": "TERM"}"#], &format!("{containers}/kill"), 400, "invalid-request", "signal"),
        (&["--json", r#"{"signal": 65}"#], &format!("{containers}/kill"), 400, "invalid-request", "65"),
        (&[], &format!("{containers}/wait?begun=true"), 400, "invalid-request", "begun"),
        (&["--request", "POST"], &format!("{containers}/start"), 409, "wrong-state", "started before"),
        (&["--request", "DELETE"], &containers, 409, "wrong-state", "shut the VM down"),
        (
            &["--json", r#"{"spec": {"limits": {"memory_byte": 1}}}"#],
            "/v1/containers",
            400,
            "invalid-request",
            "memory_byte",
        ),
        (
            &["--request", "PATCH", "--json", r#"{"memory_bytes": 0}"#],
            &format!("{containers}/limits"),
            400,
            "invalid-request",
            "memory_bytes is 0: give at least 6291456",
        ),
        (&["--json", r#"{"args": "true"}"#], &format!("{containers}/processes"), 400, "invalid-request", "args"),
    ] {
        let (code, problem) = json_of(curl(&sandbox, &pod, arguments, path));
        assert_eq!(
            (code, &problem["type"], &problem["status"]),
            (status, &json!(kind), &json!(status)),
            "{path}: {problem}"
        );
        assert!(problem["detail"].as_str().unwrap().contains(part), "{path}: {problem}");
    }
}

#[test]
fn one_vm_holds_several_containers() {
    let sandbox = Sandbox::new();
    let pod = sandbox.detached("pod", &[], "busybox", &["sleep", "1000"]);
    let id = pod.inspect("id");
    let mut spec: Value = serde_json::from_str(&pod.inspect("container.spec")).unwrap();
    // Another one beside the first, in its pid namespace, with files of its own.
    spec["id"] = json!("side");
    spec["hostname"] = json!("side");
    spec["namespaces"]["pid"] = json!({"container": id});
    spec["process"]["args"] = json!(["sh", "-c", "echo mine > /tmp/mine; hostname > /tmp/name; sleep 1000"]);
    let post = |path: &str, body: &Value| json_of(curl(&sandbox, &pod, &["--json", &body.to_string()], path));
    let (code, created) = post("/v1/containers", &json!({"spec": spec}));
    assert_eq!((code, &created["status"]), (201, &json!("created")), "{created}");
    let (code, started) = json_of(curl(&sandbox, &pod, &["--request", "POST"], "/v1/containers/side/start"));
    assert_eq!((code, &started["status"]), (200, &json!("running")), "{started}");
    let (_, all) = json_of(curl(&sandbox, &pod, &[], "/v1/containers"));
    assert_eq!(all.as_array().unwrap().len(), 2, "{all}");
    // The first one sees the other's processes, and not its files.
    let look =
        "until ps | grep -q '[/]tmp/name\\|slee[p] 1000'; do sleep 0.1; done; ps | grep -c '[s]leep 1000'; ls /tmp";
    assert_eq!(pod.verb("exec", &[], &["sh", "-c", look]).end().succeeded(), "2\n");
    let (code, _) = curl(&sandbox, &pod, &["--json", r#"{"signal": 9, "all": true}"#], "/v1/containers/side/kill");
    assert_eq!(code, 204);
    let (code, ended) = json_of(curl(&sandbox, &pod, &[], "/v1/containers/side/wait"));
    assert_eq!((code, &ended["exit_code"]), (200, &json!(137)), "{ended}");
    assert_eq!(curl(&sandbox, &pod, &["--request", "DELETE"], "/v1/containers/side").0, 204);
    assert_eq!(pod.inspect("state.status"), "running");
}

#[test]
fn what_was_only_created_can_go_again() {
    let sandbox = Sandbox::new();
    let pod = sandbox.detached("pod", &[], "busybox", &["sleep", "1000"]);
    let mut spec: Value = serde_json::from_str(&pod.inspect("container.spec")).unwrap();
    (spec["id"], spec["hostname"]) = (json!("side"), json!("side"));
    let body = json!({"spec": spec}).to_string();
    let create = || assert_eq!(curl(&sandbox, &pod, &["--json", &body], "/v1/containers").0, 201);
    create();
    assert_eq!(curl(&sandbox, &pod, &["--json", &body], "/v1/containers").0, 409);
    assert_eq!(curl(&sandbox, &pod, &["--request", "DELETE"], "/v1/containers/side").0, 204);
    create();
    assert_eq!(curl(&sandbox, &pod, &["--json", r#"{"signal": 9}"#], "/v1/containers/side/kill").0, 204);
    let (code, ended) = json_of(curl(&sandbox, &pod, &[], "/v1/containers/side/wait"));
    assert_eq!((code, &ended["exit_code"], &ended["started_ns"]), (200, &json!(137), &Value::Null), "{ended}");
    assert_eq!(pod.inspect("state.status"), "running");
}

#[test]
fn an_id_that_is_taken_harms_nobody() {
    let sandbox = Sandbox::new();
    let pod = sandbox.detached("pod", &[], "busybox", &["sleep", "1000"]);
    let processes = format!("/v1/containers/{}/processes", pod.inspect("id"));
    let body = r#"{"id": "same", "args": ["sleep", "1000"]}"#;
    assert_eq!(curl(&sandbox, &pod, &["--json", body], &processes).0, 201);
    let (code, problem) = json_of(curl(&sandbox, &pod, &["--json", body], &processes));
    assert_eq!((code, &problem["type"]), (409, &json!("already-exists")), "{problem}");
    let same = format!("{processes}/same");
    assert_eq!(json_of(curl(&sandbox, &pod, &[], &same)).1["state"], "running");
    assert_eq!(curl(&sandbox, &pod, &["--json", r#"{"signal": 9}"#], &format!("{same}/kill")).0, 204);
    assert_eq!(json_of(curl(&sandbox, &pod, &[], &format!("{same}/wait"))).1["exit_code"], 137);
    assert_eq!(pod.inspect("state.status"), "running");
}

#[test]
fn clients_that_go_away_leave_nothing() {
    let sandbox = Sandbox::new();
    let pod = sandbox.detached("pod", &[], "busybox", &["sleep", "1000"]);
    let wait = format!("/v1/containers/{}/wait", pod.inspect("id"));
    let socket = format!("{}/api.sock", pod.inspect("state_directory"));
    let monitor = sandbox.monitor();
    let descriptors = || std::fs::read_dir(format!("/proc/{monitor}/fd")).unwrap().count();
    let before = descriptors();
    let url = format!("http://cofferdam{wait}");
    let leave = format!(
        "for i in $(seq 20); do curl --silent --max-time 0.3 --unix-socket {socket} {url} & done; wait; \
         timeout -s KILL 1 \"$COFFERDAM\" attach pod; timeout -s KILL 1 \"$COFFERDAM\" logs -f pod; true"
    );
    assert_eq!(sandbox.program("sh", ["-c", &leave]).end().code(), 0);
    // One more question, after which all of them were looked at.
    assert_eq!(curl(&sandbox, &pod, &[], "/v1/vm").0, 200);
    assert!(descriptors() <= before + 1, "{before} descriptors became {}", descriptors());
}

/// The paths that end or stop what the others are asked of, those that are answered when something happens, and the one
/// whose requests are archives.
const LEFT_OUT: [&str; 8] = [
    "/v1/vm/shutdown",
    "/v1/vm/pause",
    "/v1/containers/{id}/kill",
    "/v1/containers/{id}/wait",
    "/v1/containers/{id}/processes/{process}/wait",
    "/v1/containers/{id}/logs",
    "/v1/containers/{id}/files",
    "/v1/events",
];

#[test]
fn requests_of_all_shapes_are_answered_as_described() {
    let sandbox = Sandbox::new();
    let pod = sandbox.detached("pod", &[], "busybox", &["sleep", "100000"]);
    let socket = format!("{}/api.sock", pod.inspect("state_directory"));
    let address = tests::proxy::serve(socket.as_ref()).unwrap();
    let program = std::env::var(tests::SCHEMATHESIS_VARIABLE).expect("`cargo xtask e2e` names schemathesis");
    let url = format!("http://{address}/openapi.json");
    let checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance";
    let mut words =
        vec!["run", &url, "--checks", checks, "--phases", "coverage,fuzzing", "--max-time", "60", "--seed", "1"];
    words.extend(["--max-examples", "5", "--request-timeout", "30", "--no-color", "--continue-on-failure"]);
    words.extend(LEFT_OUT.iter().flat_map(|path| ["--exclude-path", path]));
    // Its own errors say little in one line: all that it says is shown when it fails.
    let told = sandbox.program(&program, words).end();
    assert_eq!(told.code(), 0, "{}", told.text());
    // Its time may be over between a pause and what follows.
    if pod.inspect("state.status") == "paused" {
        assert_eq!(pod.verb("unpause", &[], &[]).end().succeeded(), "pod\n");
    }
    assert_eq!(pod.inspect("state.status"), "running");
}

#[test]
fn the_example_drives_a_vm_through_its_life() {
    let sandbox = Sandbox::new();
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/examples/vm_client.py");
    let cofferdam = tests::sandbox::programs().join("cofferdam");
    let ended =
        sandbox.program("python3", [example, cofferdam.to_str().unwrap(), &Sandbox::reference("busybox")]).end();
    let told = "vm_ready created started created started process_started process_exited paused resumed exited deleted exited vm_stopped";
    assert_eq!(
        ended.succeeded(),
        format!(
            "a VM of 1 CPU and 512 MiB is running\ncontainers: ['running', 'running']\n\
             executed: 3 b'through the guest\\n' b'oops\\n'\ntasks: True\nrefused: wrong-state\nside ended with 137\nevents: {told}\n"
        )
    );
}
