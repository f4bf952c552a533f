//! The host's side of the socket device, opened before the monitor enters its jail, from which no socket can be reached.

use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use api::config::{PortConfig, SocketConfig};
use devices::vsock::host_end::HostEnd;

use crate::resources::{ResourceError, inherited_path, take};

/// What is behind a port of the host.
///
/// # Errors
/// [`ResourceError`] names the port and the socket.
pub(crate) fn host_end(port: &PortConfig) -> Result<HostEnd, ResourceError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ResourceError::Connect { port: port.port, path, source }
    };
    match &port.socket {
        SocketConfig::Path(path) => UnixStream::connect(path).map(HostEnd::from).map_err(failed(path)),
        SocketConfig::Descriptor(number) => {
            HostEnd::try_from(take("the socket", *number)?).map_err(failed(&inherited_path(*number)))
        }
    }
}

/// The VM's socket.
///
/// # Errors
/// [`ResourceError`] names it.
pub(crate) fn listener(socket: &SocketConfig) -> Result<UnixListener, ResourceError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ResourceError::Listen { path, source }
    };
    match socket {
        SocketConfig::Path(path) => bind(path).map_err(failed(path)),
        SocketConfig::Descriptor(number) => {
            let descriptor = take("the VM's socket", *number)?;
            if rustix::net::sockopt::socket_acceptconn(&descriptor) != Ok(true) {
                let source = io::Error::new(io::ErrorKind::InvalidInput, "it is not a listening socket");
                return Err(failed(&inherited_path(*number))(source));
            }
            Ok(descriptor.into())
        }
    }
}

/// Makes a socket, in place of one that a monitor has left which is no more: in its jail it cannot remove it.
fn bind(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_abandoned(path) => {
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        bound => bound,
    }
}

fn is_abandoned(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
        && UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::{IntoRawFd as _, OwnedFd};

    use super::*;

    /// A descriptor as one is inherited.
    fn inherited(descriptor: impl Into<OwnedFd>) -> SocketConfig {
        SocketConfig::Descriptor(rustix::io::dup(descriptor.into()).unwrap().into_raw_fd())
    }

    #[test]
    fn only_a_socket_that_nobody_listens_at_is_replaced() {
        let place = tempfile::tempdir().unwrap();
        let (path, file) = (place.path().join("socket"), place.path().join("file"));
        fs::write(&file, "not a socket").unwrap();
        let first = listener(&SocketConfig::Path(path.clone())).unwrap();
        let socket = SocketConfig::Path(path.clone());
        assert!(matches!(listener(&socket), Err(ResourceError::Listen { .. })));
        drop(first);
        let _second = listener(&socket).unwrap();
        UnixStream::connect(&path).unwrap();
        assert!(matches!(listener(&SocketConfig::Path(file.clone())), Err(ResourceError::Listen { .. })));
        assert_eq!(fs::read_to_string(file).unwrap(), "not a socket");
    }

    #[test]
    fn what_was_inherited_has_to_be_what_it_is_for() {
        let place = tempfile::tempdir().unwrap();
        let port = |socket| PortConfig { port: 5, socket };
        let (stream, _peer) = UnixStream::pair().unwrap();
        let (reader, writer) = io::pipe().unwrap();
        let ends = [inherited(stream.try_clone().unwrap()), inherited(reader), inherited(writer)];
        // Held, since a number is inherited once.
        let _held = ends.map(|end| host_end(&port(end)).unwrap());
        let datagrams = std::os::unix::net::UnixDatagram::unbound().unwrap();
        let datagrams = inherited(datagrams);
        let listening = inherited(UnixListener::bind(place.path().join("socket")).unwrap());
        let stream = inherited(stream);
        let error = host_end(&port(datagrams)).unwrap_err();
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        assert!(matches!(error, ResourceError::Connect { port: 5, .. }) && cause.contains("keeps messages"), "{cause}");
        assert!(matches!(listener(&stream), Err(ResourceError::Listen { .. })));
        listener(&listening).unwrap();
    }
}
