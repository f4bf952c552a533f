//! A Unix socket on a loopback port, for programs that know no other sockets.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;

/// Passes every connection to a loopback port on to the socket at `path`, as long as this process lives. Gives the port's
/// address.
///
/// # Errors
/// There is no port left.
pub fn serve(path: &Path) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let address = listener.local_addr()?;
    let path = path.to_owned();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let path = path.clone();
            // A client whose server is gone is told by its connection's end.
            thread::spawn(move || pass(&client, path));
        }
    });
    Ok(address)
}

fn pass(client: &TcpStream, path: PathBuf) -> io::Result<()> {
    let server = UnixStream::connect(path)?;
    thread::scope(|scope| {
        scope.spawn(|| {
            let _ = io::copy(&mut &*client, &mut &server);
            let _ = server.shutdown(Shutdown::Write);
        });
        let _ = io::copy(&mut &server, &mut &*client);
        let _ = client.shutdown(Shutdown::Both);
    });
    Ok(())
}
