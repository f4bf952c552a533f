//! What a monitor can use up: the resource limits hold in every jail, wherever it is and whoever's it is.

use super::{CALLERS, Host, REFUSED};

#[test]
fn memory_ends_at_the_limit() {
    for caller in CALLERS {
        let host = Host::new(caller);
        let (code, said) = host.attempt("none", &["memory", "16"]);
        assert_eq!(code, Some(0), "{said}");
        let (code, said) = host.attempt("none", &["memory", "8192"]);
        assert_eq!(code, Some(REFUSED), "{said}");
        assert!(said.contains("Cannot allocate memory"), "{said}");
    }
}

#[test]
fn threads_end_at_the_limit() {
    for caller in CALLERS {
        let host = Host::new(caller);
        let (code, said) = host.attempt("none", &["threads", "8"]);
        assert_eq!(code, Some(0), "{said}");
        let (code, said) = host.attempt("none", &["threads", "100"]);
        assert_eq!(code, Some(REFUSED), "{said}");
        assert!(said.contains("Resource temporarily unavailable"), "{said}");
    }
}

#[test]
fn descriptors_end_at_the_limit() {
    for caller in CALLERS {
        let host = Host::new(caller);
        let (code, said) = host.attempt("none", &["files", "100000"]);
        assert_eq!(code, Some(REFUSED), "{said}");
        assert!(said.contains("Too many open files"), "{said}");
    }
}
