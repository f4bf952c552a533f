//! `/v1/containers/{id}/files`: what is at a path of a container, out of it and into it, as a tar archive.

use std::io;

use axum::body::Body as HttpBody;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::TryStreamExt as _;
use protocol::{Answer, Call};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use utoipa::ToSchema;

use super::guest::{CALL_DEADLINE, done, unfit};
use super::problem::{Path, Problem, ProblemKind, Query};
use super::{Context, Offer, Shared};

/// Bytes moved at once.
const PIECE: usize = 64 << 10;
/// The header that says what is at the path.
const STAT: HeaderName = HeaderName::from_static("cofferdam-path-stat");

/// A path in a container.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct FileQuery {
    /// The absolute path, resolved in the container's root. A symbolic link at its end is followed where it ends with `/`
    /// or `/.`.
    path: String,
}

/// What is at a path: the JSON in the header `Cofferdam-Path-Stat`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PathStat {
    /// The path's last component; `.` where it ends with `/.`, `/` of the root.
    pub name: String,
    /// File type and permission bits (`st_mode` of stat(2)).
    pub mode: u32,
    /// Its size in bytes.
    pub size: u64,
    /// When it was changed last, in seconds since 1970.
    pub modified: i64,
    /// Where a symbolic link points; empty for anything else.
    pub link_target: String,
}

/// Offers a port for an archive, and gives the offer and our end.
fn offer(context: &Shared) -> Result<(Offer, UnixStream), Problem> {
    let offered = context.offer().and_then(|(offer, ours)| Ok((offer, UnixStream::from_std(ours)?)));
    offered.map_err(|error| {
        Problem::new(ProblemKind::MonitorFailed, format!("cannot make a stream for the archive: {error}"))
    })
}

/// Waits for something that the guest is to do with an archive, as long as the guest lives and does anything.
async fn moved<T>(context: &Context, what: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let mut over = context.guest_over.subscribe();
    tokio::select! {
        biased;
        done = what => done,
        _ = over.wait_for(|over| *over) => Err(io::Error::new(io::ErrorKind::BrokenPipe, "the guest has ended")),
        () = tokio::time::sleep(CALL_DEADLINE) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Copy what is at a path out of a container
///
/// A tar archive whose entries begin with the path's last component, or with `.` where the path ends with `/.` or is the
/// root. One that does not end with two blocks of zeroes is not whole. Its content is the container's: untrusted.
#[utoipa::path(get, path = "/v1/containers/{id}/files", tag = "files", params(("id" = String, Path), FileQuery),
    responses((status = 200, content_type = "application/x-tar"),
        (status = "4XX", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn copy_out(
    State(context): State<Shared>,
    Path(id): Path<String>,
    Query(FileQuery { path }): Query<FileQuery>,
) -> Result<Response, Problem> {
    context.vm.state().container(&id)?.check_running(&id)?;
    let (offer, stream) = offer(&context)?;
    let answer = context.guest.call(Call::CopyOut { container: id, path, port: offer.port }).await?;
    drop(offer);
    let Answer::Path(info) = answer else { return Err(unfit()) };
    let stat = PathStat {
        name: info.name,
        mode: info.mode,
        size: info.size,
        modified: info.modified,
        link_target: info.link_target,
    };
    // JSON with everything escaped that a header cannot hold.
    let stat = serde_json::to_string(&stat).map(|text| escape(&text)).unwrap_or_default();
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-tar"));
    if let Ok(stat) = HeaderValue::from_str(&stat) {
        headers.insert(STAT, stat);
    }
    let pieces = futures_util::stream::try_unfold((context, stream), |(context, mut stream)| async move {
        let mut piece = bytes::BytesMut::with_capacity(PIECE);
        let count = moved(&context, stream.read_buf(&mut piece)).await?;
        Ok::<_, io::Error>((count > 0).then(|| (piece.freeze(), (context, stream))))
    });
    Ok((headers, HttpBody::from_stream(pieces)).into_response())
}

/// Writes what is not printable ASCII as JSON escapes.
fn escape(json: &str) -> String {
    let mut units = [0; 2];
    json.chars().fold(String::with_capacity(json.len()), |mut text, c| {
        if matches!(c, ' '..='~') {
            text.push(c);
        } else {
            for unit in c.encode_utf16(&mut units) {
                text.push_str(&format!("\\u{unit:04x}"));
            }
        }
        text
    })
}

/// Copy a tar archive into a directory of a container
///
/// No entry leaves the directory.
#[utoipa::path(put, path = "/v1/containers/{id}/files", tag = "files", params(("id" = String, Path), FileQuery),
    request_body(content_type = "application/x-tar"),
    responses((status = 204), (status = "4XX", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn copy_in(
    State(context): State<Shared>,
    Path(id): Path<String>,
    Query(FileQuery { path }): Query<FileQuery>,
    body: HttpBody,
) -> Result<StatusCode, Problem> {
    context.vm.state().container(&id)?.check_running(&id)?;
    let (offer, mut stream) = offer(&context)?;
    let mut answer = context.guest.send(Call::CopyIn { container: id, path, port: offer.port })?;
    let context = &context;
    let copy = async move {
        let mut pieces = body.into_data_stream().map_err(|error| {
            Problem::new(ProblemKind::InvalidRequest, format!("the archive did not arrive whole: {error}"))
        });
        let mut taken = true;
        while let Some(piece) = pieces.try_next().await? {
            // A guest that takes no more says in its answer whether that was the end of the archive.
            taken = taken && moved(context, stream.write_all(&piece)).await.is_ok();
        }
        let _ = stream.shutdown().await;
        Ok::<_, Problem>(())
    };
    tokio::pin!(copy);
    let early = tokio::select! {
        biased;
        copied = &mut copy => copied.map(|()| None)?,
        early = answer.early() => Some(early?),
    };
    let answer = match early {
        // What follows the end of the archive is nobody's.
        Some(answer) => copy.await.map(|()| answer)?,
        None => answer.answer().await?,
    };
    done(answer)?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_holds_any_name() {
        let text = escape(&serde_json::to_string("a\u{1}ä𝄞").unwrap());
        assert!(text.is_ascii());
        assert_eq!(serde_json::from_str::<String>(&text).unwrap(), "a\u{1}ä𝄞");
    }
}
