//! A front end, and a monitor that answers anything: the monitor is not trusted once its guest runs.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;

use api::client::{Client, ClientError, SOCKET};
use api::model::{Balloon, Container, ContainerState, Event, Process, Stats, Top, Vm, WaitResult};
use hyper::Method;
use runtime::multiplexed::{Frames, Stop};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::input::Input;
use crate::scratch;

thread_local! {
    static MONITOR: (TempDir, UnixListener) = {
        let folder = scratch::folder();
        let listener = UnixListener::bind(folder.path().join(SOCKET)).expect("a socket can be bound");
        (folder, listener)
    };
}

/// An answer of a monitor, head and body, to each kind of question: the first byte says which.
pub fn answer(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (question, answer) = (input.u8() % 11, input.rest());
    MONITOR.with(|(folder, listener)| {
        let client = Client::new(folder.path());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime can be made");
        // What is longer than a socket holds is cut: nobody reads while it is written.
        let asked = async {
            let asked = tokio::task::spawn(async move { ask(&client, question).await });
            // It connects before it is accepted, so that nothing waits here.
            tokio::task::yield_now().await;
            if let Ok((mut stream, _)) = listener.accept() {
                let _ = stream.set_nonblocking(true);
                let _ = stream.write(answer);
                let _ = stream.shutdown(Shutdown::Write);
                let outcome = asked.await;
                while matches!(stream.read(&mut [0; 4096]), Ok(1..)) {}
                outcome.expect("a question does not panic").err().into_iter().for_each(|error| {
                    let _ = (error.kind(), error.to_string());
                });
            }
        };
        runtime.block_on(asked);
    });
}

async fn ask(client: &Client, question: u8) -> Result<(), ClientError> {
    match question {
        0 => client.get::<Container>("/v1/containers/c").await.map(drop),
        1 => client.get::<ContainerState>("/v1/containers/c/wait").await.map(drop),
        2 => client.get::<Vm>("/v1/vm").await.map(drop),
        3 => client.get::<Stats>("/v1/containers/c/stats").await.map(drop),
        4 => client.get::<Top>("/v1/containers/c/top").await.map(drop),
        5 => client.get::<Vec<Process>>("/v1/containers/c/processes").await.map(drop),
        6 => client.get::<Balloon>("/v1/vm/balloon").await.map(drop),
        7 => client.get::<Event>("/v1/events").await.map(drop),
        8 => client.ask::<WaitResult>(Method::POST, "/v1/containers", Some(&json!({}))).await.map(drop),
        9 => client.act(Method::DELETE, "/v1/containers/c", None::<&Value>).await,
        _ => client.upgrade("/v1/containers/c/attach", None::<&Value>).await.map(drop),
    }
}

/// The output of a process, in frames that are cut as the first byte says, and as lines.
///
/// # Panics
/// It depends on where the pieces are cut.
pub fn output(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (piece, bytes) = (usize::from(input.u8()) + 1, input.rest());
    assert_eq!(taken(bytes, piece), taken(bytes, usize::MAX), "output depends on how it is cut");
}

fn taken(bytes: &[u8], piece: usize) -> (Vec<u8>, Option<String>) {
    let (mut frames, mut output) = (Frames::default(), Vec::new());
    for piece in bytes.chunks(piece) {
        let pushed = frames.push(piece, |_, bytes| {
            output.extend_from_slice(bytes);
            Ok(())
        });
        if let Err(stop) = pushed {
            let Stop::Lost(line) = stop else { panic!("nothing was not written") };
            return (output, Some(line));
        }
    }
    (output, frames.lost())
}
