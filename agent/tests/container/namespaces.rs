//! Namespaces that containers share, or have of their own.

use std::io::Write;
use std::net::Shutdown;

use protocol::FailureKind;
use protocol::container::{ContainerSpec, Namespace, NetworkNamespace};

use crate::host::Host;
use crate::image::{Image, script};

/// A container that says which namespaces it is in, and goes on until its input ends.
fn telling(image: &Image, id: &str) -> ContainerSpec {
    let tell = "for n in pid ipc net uts mnt; do readlink /proc/self/ns/$n; done; echo ready; read line; exit 5";
    image.spec(id, &["sh", "-c", tell])
}

fn links(streams: &mut crate::host::Streams) -> Vec<String> {
    std::iter::from_fn(|| {
        let line = streams.line();
        (line != "ready").then_some(line)
    })
    .collect()
}

#[test]
fn what_is_shared_is_the_same_and_the_rest_is_not() {
    let image = Image::new();
    let mut host = Host::new();
    let one = telling(&image, "one");
    let mut two = telling(&image, "two");
    two.namespaces.pid = Namespace::Container("one".into());
    two.namespaces.ipc = Namespace::Container("one".into());
    two.namespaces.network = NetworkNamespace::Container("one".into());
    let mut third = telling(&image, "third");
    third.namespaces.network = NetworkNamespace::Own;
    let [mut first, mut second, mut other] = [&one, &two, &third].map(|spec| host.launch(spec).unwrap());
    let (one, two, third) = (links(&mut first), links(&mut second), links(&mut other));
    assert_eq!(one[..3], two[..3]);
    assert!((3..5).all(|index| one[index] != two[index]));
    assert!((0..5).all(|index| one[index] != third[index]));
    // Each sees the other's processes, and an exec'd process is where its container is.
    let output = host.run_further(
        "two",
        "p",
        &script("cat /proc/1/cmdline | tr '\\0' ' '; readlink /proc/self/ns/pid; readlink /proc/self/ns/ipc"),
    );
    assert!(
        output.stdout.starts_with("sh -c ") && output.stdout.ends_with(&format!("{}\n{}\n", one[0], one[1])),
        "{output:?}"
    );
    // The one that joined ends alone, with all that it left behind.
    let left = host.exec("two", "q", &script("sleep 1000 & sleep 1000")).unwrap();
    second.stdin.shutdown(Shutdown::Write).unwrap();
    assert_eq!(host.process_exited("two", "q"), 137);
    assert_eq!(host.exited("two").code, 5);
    drop(left);
    let output = host.run_further("one", "p", &script("cat /proc/[0-9]*/cmdline | tr '\\0' ' '"));
    assert!(!output.stdout.contains("sleep"), "{output:?}");
    for (id, streams) in [("one", first), ("third", other)] {
        streams.stdin.shutdown(Shutdown::Write).unwrap();
        assert_eq!(host.exited(id).code, 5);
    }
}

#[test]
fn the_end_of_a_pid_namespace_is_the_end_of_who_joined_it() {
    let image = Image::new();
    let mut host = Host::new();
    let mut first = host.launch(&telling(&image, "one")).unwrap();
    let mut two = image.spec("two", &["sleep", "1000"]);
    two.namespaces.pid = Namespace::Container("one".into());
    host.launch(&two).unwrap();
    let _streams = host.exec("two", "p", &script("sleep 1000")).unwrap();
    first.stdin.write_all(b"\n").unwrap();
    // They go in the order in which the kernel lets them.
    let mut ended: Vec<String> = (0..3).map(|_| format!("{:?}", host.next())).collect();
    ended.sort();
    assert!(ended[0].starts_with("Exited { container: \"one\", status: ExitStatus { code: 5"), "{ended:?}");
    assert!(ended[1].starts_with("Exited { container: \"two\", status: ExitStatus { code: 137"), "{ended:?}");
    assert_eq!(ended[2], "ProcessExited { container: \"two\", process: \"p\", code: 137 }");
    assert_eq!(host.children(), 0);
}

#[test]
fn a_network_of_its_own_has_a_loopback_that_is_up() {
    let image = Image::new();
    let mut host = Host::new();
    let mut spec = image.shell("ifconfig; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; ls /sys/class/net");
    spec.namespaces.network = NetworkNamespace::Own;
    let output = host.run(&spec, b"");
    assert!(output.stdout.contains("inet addr:127.0.0.1"), "{output:?}");
    assert!(output.stdout.ends_with("0\nlo\n"), "{output:?}");
}

#[test]
fn memory_is_shared_with_the_ipc_namespace() {
    let image = Image::new();
    let mut host = Host::new();
    let mut first = host.launch(&image.shell("echo there > /dev/shm/x; echo ready; sleep 1000")).unwrap();
    first.expect("ready\n");
    let mut two = image.shell("cat /dev/shm/x; echo back > /dev/shm/y; mount | grep -c ' on /dev/shm '");
    two.id = "two".into();
    two.namespaces.ipc = Namespace::Container("c".into());
    assert_eq!(host.run(&two, b"").stdout, "there\n1\n");
    assert_eq!(host.run_further("c", "p", &script("cat /dev/shm/y")).stdout, "back\n");
    host.kill("c");
}

#[test]
fn only_what_runs_can_be_joined() {
    let image = Image::new();
    let mut host = Host::new();
    host.create(&image.spec("created", &["sleep", "1000"])).unwrap();
    for id in ["nobody", "created", "c"] {
        let mut specs = [(); 3].map(|()| image.spec("c", &["true"]));
        specs[0].namespaces.pid = Namespace::Container(id.into());
        specs[1].namespaces.ipc = Namespace::Container(id.into());
        specs[2].namespaces.network = NetworkNamespace::Container(id.into());
        for spec in specs {
            let failure = host.create(&spec).unwrap_err();
            let message = format!("container {id} is not running, so its namespaces cannot be joined");
            assert_eq!((failure.kind, failure.message), (FailureKind::InvalidRequest, message));
        }
    }
    host.kill("created");
    assert_eq!(host.children(), 0);
}
