//! Reading layers: decompression and its limits, the tar format, and applying entries to the tree.
//!
//! OCI Image Specification, "Image Layer Filesystem Changeset". What is accepted beyond it is what docker and
//! containerd accept:
//! - Names are relative to the image's root, with or without a leading `/` or `./`. A `..` component is refused.
//! - Parent directories may be symbolic links: they are followed inside the image, as in a chroot; one that climbs
//!   above the root is refused. Missing parents are made (0755, root, time 0).
//! - Targets of symbolic links are data and may be anything; targets of hard links obey the rules of names, and
//!   must exist in this or a lower layer.
//! - Device nodes are kept (the guest decides who may open them) if Linux can represent their number.
//! - Extended attributes of the namespaces user, trusted, security and POSIX ACLs are kept, others dropped, as are
//!   `trusted.overlay.*` and `user.overlay.*`, with which a layer could talk to the guest's overlay filesystem.

mod ahead;
mod apply;
mod pax;
mod sparse;
mod stream;
mod tarball;

pub(crate) use apply::{Flattener, LayerFault};
pub(crate) use tarball::{MemberKind, TarReader};
