//! The server as a guest sees it: by messages.

mod bounds;
mod client;
mod confined;
mod containment;
mod files;
mod hostile;
mod locks;
mod quota;
mod read_only;
mod saved;
mod single_file;
