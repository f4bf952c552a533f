//! Registries that misbehave: answers without end, answers that stall, redirects, tokens that run out.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use image::{PullOptions, Reference, Silent};

use crate::images::TestImage;
use crate::registry::five_layers;
use crate::{Fixture, chain, snapshot};

/// One request: its path and its header lines, in lower case.
struct Request {
    path: String,
    headers: Vec<String>,
}

impl Request {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }
}

/// A server that answers each request as it is told, one to a connection. Gives its address.
fn serve(answer: impl Fn(&Request, &mut TcpStream) -> std::io::Result<()> + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let answer = std::sync::Arc::new(answer);
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let answer = answer.clone();
            std::thread::spawn(move || {
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                let Some(first) = lines.next() else { return };
                let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
                let headers = lines.take_while(|line| !line.is_empty()).map(|line| line.to_lowercase()).collect();
                let mut stream = stream;
                let _ = answer(&Request { path, headers }, &mut stream);
            });
        }
    });
    address
}

fn reply(stream: &mut TcpStream, status: &str, headers: &str, body: &[u8]) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n", body.len())?;
    stream.write_all(body)
}

/// Answers like a registry that has one image.
fn reply_from(image: &TestImage, request: &Request, stream: &mut TcpStream) -> std::io::Result<()> {
    let name = request.path.rsplit('/').next().unwrap_or_default();
    let digest = name.parse().unwrap_or(image.manifest);
    match image.blobs.get(&digest) {
        Some(bytes) => reply(stream, "200 OK", "", bytes),
        None => reply(stream, "404 Not Found", "", b""),
    }
}

/// The error of a pull that must fail soon.
fn refused(address: &str) -> String {
    let fixture = Fixture::new();
    let mut options = PullOptions::default();
    options.registry.stall_timeout = Duration::from_secs(1);
    options.registry.login_file = Some(fixture.path("no-logins"));
    let reference: Reference = format!("{address}/a:1").parse().unwrap();
    let start = Instant::now();
    let error = fixture.store.pull(&reference, &options, &Silent).expect_err("the image was accepted");
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    assert!(fixture.store.list().unwrap().is_empty());
    chain(&error)
}

#[test]
fn answers_without_end_are_cut_off() {
    let endless = |status: &'static str| {
        serve(move |_, stream| {
            write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\n\r\n")?;
            loop {
                stream.write_all(&[b' '; 65536])?;
            }
        })
    };
    let text = refused(&endless("200 OK"));
    assert!(text.contains("more than the limit of 4194304"), "{text}");
    let text = refused(&endless("500 Internal Server Error"));
    assert!(text.contains("answered 500 to the request for manifest"), "{text}");
    for status in ["200 OK", "403 Forbidden"] {
        let tokens = endless(status);
        let text = refused(&serve(move |_, stream| {
            let realm = format!("WWW-Authenticate: Bearer realm=\"http://{tokens}/token\"\r\n");
            reply(stream, "401 Unauthorized", &realm, b"")
        }));
        let expected = if status == "200 OK" { "more than the limit of 1048576" } else { "refuses access to `a`" };
        assert!(text.contains(expected), "{text}");
    }
    let image = five_layers();
    let layer = image.layers[2].to_string();
    let address = serve(move |request, stream| {
        if !request.path.ends_with(&layer) {
            return reply_from(&image, request, stream);
        }
        write!(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
        loop {
            stream.write_all(&[b'x'; 65536])?;
        }
    });
    let text = refused(&address);
    assert!(text.contains("it is truncated or was replaced"), "{text}");
}

#[test]
fn answers_that_stall_are_given_up() {
    let address = serve(|_, stream| {
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{{")?;
        // Held open until the client gives up.
        std::io::copy(stream, &mut std::io::sink()).map(drop)
    });
    let text = refused(&address);
    assert!(text.starts_with("cannot fetch manifest "), "{text}");
    let address = serve(|_, stream| std::io::copy(stream, &mut std::io::sink()).map(drop));
    let text = refused(&address);
    assert!(text.contains(" cannot be reached"), "{text}");
}

#[test]
fn nonsense_is_an_error() {
    for (status, body) in
        [("200 OK", &b"\xff\xfe"[..]), ("200 OK", b""), ("204 No Content", b""), ("999 What", b""), ("302 Found", b"")]
    {
        let text = refused(&serve(move |_, stream| reply(stream, status, "Location: /v2/\r\n", body)));
        assert!(!text.is_empty());
    }
    refused(&serve(|_, stream| stream.write_all(b"\0\0\0\0 not http at all\r\n\r\n")));
    // Asks for a login again and again, at a place that does not exist.
    let text = refused(&serve(|_, stream| {
        let realm = "WWW-Authenticate: Bearer realm=\"http://127.0.0.1:9/token\",service=\"x\"\r\n";
        reply(stream, "401 Unauthorized", realm, b"")
    }));
    assert!(text.contains(" cannot be reached"), "{text}");
    let text =
        refused(&serve(|_, stream| reply(stream, "401 Unauthorized", "WWW-Authenticate: Basic realm=\"x\"\r\n", b"")));
    assert!(text.contains("refuses access to `a`"), "{text}");
}

#[test]
fn a_login_goes_where_the_registry_says_and_nobody_else() {
    let asked = std::sync::Arc::new(Mutex::new(Vec::new()));
    let notes = std::sync::Arc::clone(&asked);
    let thief = serve(move |request, stream| {
        notes.lock().unwrap().extend(request.header("authorization").map(str::to_owned));
        let host = request.header("host").unwrap_or_default();
        let realm = format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\"\r\n");
        reply(stream, "401 Unauthorized", &realm, b"")
    });
    let address = serve(move |_, stream| {
        reply(stream, "307 Temporary Redirect", &format!("Location: http://{thief}/a\r\n"), b"")
    });
    let fixture = Fixture::new();
    let logins = fixture.path("logins");
    std::fs::write(&logins, format!(r#"{{"auths":{{"{address}":{{"auth":"dXNlcjpwYXNz"}}}}}}"#)).unwrap();
    let mut options = PullOptions::default();
    options.registry.login_file = Some(logins);
    let reference: Reference = format!("{address}/a:1").parse().unwrap();
    let error = fixture.store.pull(&reference, &options, &Silent).expect_err("there is no image");
    assert!(chain(&error).contains("refuses access to `a`"), "{}", chain(&error));
    assert_eq!(*asked.lock().unwrap(), [""; 0]);
}

#[test]
fn a_wrong_range_is_noticed() {
    // Answers every request with a part, wherever it was to begin.
    let image = five_layers();
    let layer = image.layers[0].to_string();
    let address = serve(move |request, stream| {
        if request.path.ends_with(&layer) {
            return reply(stream, "206 Partial Content", "Content-Range: bytes 5-9/10\r\n", b"xxxxx");
        }
        reply_from(&image, request, stream)
    });
    let text = refused(&address);
    assert!(text.contains("it is truncated or was replaced"), "{text}");
}

#[test]
fn tokens_are_fetched_and_renewed() {
    // Each token is good for four requests.
    let image = five_layers();
    let expected = image.clone();
    let left: Mutex<Vec<u32>> = Mutex::default();
    let address = serve(move |request, stream| {
        let mut left = left.lock().unwrap();
        if request.path.starts_with("/token?") {
            assert!(request.path.contains("scope=repository%3Aa%3Apull"), "{}", request.path);
            left.push(4);
            return reply(stream, "200 OK", "", format!("{{\"token\":\"{}\"}}", left.len() - 1).as_bytes());
        }
        let number =
            request.header("authorization").and_then(|value| value.strip_prefix("bearer ")?.parse::<usize>().ok());
        match number.and_then(|number| left.get_mut(number)) {
            Some(left) if *left > 0 => {
                *left -= 1;
                reply_from(&image, request, stream)
            }
            _ => {
                let host = request.header("host").unwrap_or_default();
                let realm = format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\",service=\"test\"\r\n");
                reply(stream, "401 Unauthorized", &realm, b"")
            }
        }
    });
    let fixture = Fixture::new();
    let mut options = PullOptions::default();
    options.registry.login_file = Some(fixture.path("no-logins"));
    let reference: Reference = format!("{address}/a:1").parse().unwrap();
    let pulled = fixture.store.pull(&reference, &options, &Silent).unwrap();
    assert_eq!(pulled.id, expected.config.to_string());
    snapshot::fsck(&pulled.rootfs);
}
