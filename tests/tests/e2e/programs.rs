//! Programs that people run, and that notice when something about their surroundings is wrong.

use tests::sandbox::Sandbox;

/// Uses what needs /proc (the number of CPUs, the list of open files), /dev/shm (semaphores and shared memory between
/// processes) and a locale (text in UTF-8).
const PYTHON: &str = r#"
import hashlib, locale, multiprocessing, os, sqlite3, subprocess, sys, tempfile
from multiprocessing import shared_memory

def square(n):
    return n * n

def add(counter, name, index):
    block = shared_memory.SharedMemory(name=name)
    block.buf[index] = index + 1
    block.close()
    with counter.get_lock():
        counter.value += 1

if __name__ == "__main__":
    assert os.cpu_count() == 2 == len(os.sched_getaffinity(0)), os.cpu_count()
    assert sys.getfilesystemencoding() == "utf-8" and locale.getpreferredencoding() == "UTF-8"
    assert len(os.listdir("/proc/self/fd")) >= 3
    with multiprocessing.Pool(2) as pool:
        assert sum(pool.map(square, range(100))) == 328350
    block = shared_memory.SharedMemory(create=True, size=4096)
    counter = multiprocessing.Value("i", 0)
    workers = [multiprocessing.Process(target=add, args=(counter, block.name, i)) for i in range(3)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    assert bytes(block.buf[:3]) == b"\1\2\3" and counter.value == 3
    block.close()
    block.unlink()
    with tempfile.NamedTemporaryFile() as file:
        database = sqlite3.connect(file.name)
        database.execute("create table t (x)")
        database.executemany("insert into t values (?)", [(n,) for n in range(1000)])
        database.commit()
        assert database.execute("select sum(x) from t").fetchone() == (499500,)
    assert subprocess.run(["sh", "-c", "exit 3"]).returncode == 3
    print(hashlib.sha256(b"cofferdam").hexdigest()[:8], "ü✓")
"#;

#[test]
fn python_computes() {
    let sandbox = Sandbox::new();
    let flags = ["-i", "--cpus", "2", "-w", "/root"];
    let ended = sandbox.run(&flags, "debian", &["sh", "-c", "cat > main.py && python3 main.py"]).input(PYTHON).end();
    let digest: String = tests::layout::digest(b"cofferdam")[7..15].to_owned();
    assert_eq!(ended.succeeded(), format!("{digest} \u{fc}\u{2713}\n"));
}

#[test]
fn debian_looks_as_debian_should() {
    let sandbox = Sandbox::new();
    let script = ". /etc/os-release; echo $ID $VERSION_ID; dpkg -l python3 | tail -n 1 | cut -c 1-2; \
                  su -s /bin/sh nobody -c id; locale charmap; perl -e 'print 6*7, \"\\n\"'; find /usr/bin | wc -l | grep -c ...";
    let ended = sandbox.run(&[], "debian", &["bash", "-c", script]).end();
    let nobody = "uid=65534(nobody) gid=65534(nogroup) groups=65534(nogroup)";
    assert_eq!(ended.succeeded(), format!("debian 12\nii\n{nobody}\nUTF-8\n42\n1\n"));
}

#[test]
fn redis_answers() {
    let sandbox = Sandbox::new();
    let script = "mkfifo /tmp/log; exec 3<>/tmp/log
                  redis-server --save '' --dir /tmp > /tmp/log &
                  while read -u 3 line; do case $line in *'Ready to accept'*) break;; esac; done
                  redis-cli set key 'some value'; redis-cli get key
                  redis-cli -x set blob < /etc/ld.so.cache > /dev/null
                  redis-cli get blob | head -c $(stat -c %s /etc/ld.so.cache) | cmp - /etc/ld.so.cache && echo same
                  redis-cli incrby counter 41; redis-cli incr counter; redis-cli config get maxclients | tail -n 1
                  redis-cli shutdown nosave; wait; echo ended: $?";
    let ended = sandbox.run(&["-m", "256m"], "redis", &["bash", "-c", script]).end();
    assert_eq!(ended.succeeded(), "OK\nsome value\nsame\n41\n42\n10000\nended: 0\n");
}

#[test]
fn a_server_ends_in_order_when_told_to() {
    let sandbox = Sandbox::new();
    // The image's own command.
    let running = sandbox.run(&[], "redis", &[]).start();
    running.wait_for("Ready to accept connections");
    running.signal(rustix::process::Signal::TERM);
    let ended = running.end();
    assert!(ended.succeeded().contains("bye bye"), "{ended:?}");
}
