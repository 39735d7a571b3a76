//! Sysctls of a network namespace.
//!
//! `/proc/sys/net` shows the namespace of the thread that looks a name up, so reading and writing happen inside
//! [`Netns::run`]. Keys are paths below `/proc/sys` with `/` as separator, because interface names may contain dots.
//!
//! In a container that is not privileged `/proc/sys` is read-only. Its `net` mounted anywhere else shows the same and can
//! be written, with [`ROOT_ENV`] saying where.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;

use crate::netns::Netns;

/// Environment variable: the directory in which the sysctls' `net` is, in place of `/proc/sys`.
pub const ROOT_ENV: &str = "AMBIDEX_PROC_SYS";

/// Where they are unless the environment says otherwise.
const ROOT: &str = "/proc/sys";

/// Reads a sysctl, e.g. `net/ipv4/conf/all/rp_filter`, without the final newline.
///
/// # Errors
/// The key is outside `net/`, absent or unreadable; the message names it.
pub fn read(ns: &Netns, key: &str) -> io::Result<String> {
    let path = path_of(key)?;
    let text = ns.run(|| fs::read_to_string(path))?;
    match text {
        Ok(text) => Ok(text.trim_end_matches('\n').to_owned()),
        Err(e) => Err(with_context(e, &format!("sysctl {key}"))),
    }
}

/// Writes a sysctl.
///
/// # Errors
/// The key is outside `net/`, absent or read-only, or the kernel refuses the value; the message names both.
pub fn write(ns: &Netns, key: &str, value: &str) -> io::Result<()> {
    let path = path_of(key)?;
    // Never create: with a wrong key that would be a confusing EACCES from procfs.
    let written = ns.run(|| {
        let mut file = OpenOptions::new().write(true).open(path)?;
        file.write_all(value.as_bytes())
    })?;
    written.map_err(|e| with_context(e, &format!("sysctl {key} = {value}")))
}

/// Only keys below `net/` belong to a network namespace; anything else would change the whole machine.
fn path_of(key: &str) -> io::Result<PathBuf> {
    let mut parts = key.split('/');
    let in_net = parts.next() == Some("net");
    let mut depth = 0;
    let plain = parts.all(|part| {
        depth += 1;
        !part.is_empty() && part != "." && part != ".." && !part.contains('\0')
    });
    if !in_net || !plain || depth == 0 {
        let message =
            format!("sysctl {key}: not a key of a network namespace (net/..., no `..` in it)");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    Ok(root(std::env::var_os(ROOT_ENV)).join(key))
}

/// The directory that the environment names. One that is not absolute would mean another at every working directory.
fn root(said: Option<OsString>) -> PathBuf {
    said.map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .unwrap_or_else(|| PathBuf::from(ROOT))
}

fn with_context(error: io::Error, what: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::path::Path;

    use super::*;

    #[test]
    fn a_value_is_written_in_the_namespace_only() {
        let key = "net/ipv4/conf/default/rp_filter";
        let here = Netns::current().unwrap();
        let there = Netns::create_unnamed().unwrap();
        let before = read(&here, key).unwrap();
        for value in ["2", "0", "1"] {
            write(&there, key, value).unwrap();
            assert_eq!(read(&there, key).unwrap(), value);
        }
        assert_eq!(read(&here, key).unwrap(), before);
    }

    #[test]
    fn the_environment_says_where_they_are() {
        assert_eq!(root(None), Path::new("/proc/sys"));
        assert_eq!(root(Some("/host/sys".into())), Path::new("/host/sys"));
        for nothing in ["", "host"] {
            assert_eq!(root(Some(nothing.into())), Path::new("/proc/sys"));
        }
    }

    #[test]
    fn keys_outside_net_are_refused() {
        let here = Netns::current().unwrap();
        let keys = [
            "kernel/hostname",
            "net",
            "net/",
            "/net/ipv4/ip_forward",
            "net/../kernel/hostname",
            "net//ipv4/ip_forward",
            "",
        ];
        for key in keys {
            assert_eq!(
                read(&here, key).unwrap_err().kind(),
                io::ErrorKind::InvalidInput,
                "{key}"
            );
            assert_eq!(
                write(&here, key, "0").unwrap_err().kind(),
                io::ErrorKind::InvalidInput,
                "{key}"
            );
        }
    }

    #[test]
    fn errors_name_key_and_value() {
        let there = Netns::create_unnamed().unwrap();
        let absent = write(&there, "net/ipv4/conf/nosuch/rp_filter", "2").unwrap_err();
        assert_eq!(absent.kind(), io::ErrorKind::NotFound);
        let text = absent.to_string();
        assert!(
            text.starts_with("sysctl net/ipv4/conf/nosuch/rp_filter = 2: "),
            "{text}"
        );
        let bad = write(&there, "net/ipv4/ip_forward", "yes").unwrap_err();
        assert!(
            bad.to_string()
                .starts_with("sysctl net/ipv4/ip_forward = yes: "),
            "{bad}"
        );
    }
}
