//! Network namespaces: open, enter for one closure, create and delete by name.
//!
//! `setns` is per thread and a socket belongs for life to the namespace it was created in. So work in another
//! namespace is a synchronous closure on one thread ([`Netns::run`]), never something that awaits.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::fstat;
use nix::sys::statfs::{FsType, fstatfs};
use serde::{Deserialize, Serialize};

/// Where `ip netns` and this crate keep named namespaces.
const NAMED_DIR: &str = "/run/netns";
/// The namespace of the calling thread; `/proc/self` would be that of the main thread.
const OWN_NETNS: &str = "/proc/thread-self/ns/net";
/// `NSFS_MAGIC` of linux/magic.h, the file system type of namespace files.
const NSFS: FsType = FsType(0x6e73_6673);

/// The kernel's identity of a namespace: device and inode of its nsfs file. Two paths or descriptors name the same
/// namespace exactly when these are equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NetnsId {
    /// Device number of nsfs.
    pub dev: u64,
    /// Inode of the namespace.
    pub ino: u64,
}

impl fmt::Display for NetnsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "net:[{}]", self.ino)
    }
}

impl fmt::Debug for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.id.fmt(f)
    }
}

/// An open network namespace. Cheap to clone; the descriptor keeps the namespace alive.
#[derive(Clone)]
pub struct Netns {
    fd: Arc<OwnedFd>,
    id: NetnsId,
}

impl Netns {
    /// The namespace that the calling thread is in.
    pub fn current() -> io::Result<Self> {
        let file = File::open(OWN_NETNS).map_err(|e| named(e, OWN_NETNS))?;
        Self::trusted(file.into())
    }

    /// Opens a namespace by path: `/run/netns/NAME`, `/proc/PID/ns/net`, a CNI netns path.
    ///
    /// # Errors
    /// The path cannot be opened, or is not a network namespace; both name the path.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|e| named(e, path.display()))?;
        Self::from_fd(file.into()).map_err(|e| named(e, path.display()))
    }

    /// Takes over a descriptor that somebody else opened, after making sure that it is a network namespace.
    ///
    /// # Errors
    /// It is something else: a file, a pid descriptor, another kind of namespace.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        if fstatfs(&fd)?.filesystem_type() != NSFS {
            return Err(not_a_netns());
        }
        // Only the kernel can say which kind of namespace it is (the link in /proc/self/fd shows the mount point for
        // bind mounts).
        if kind_of_namespace(fd.as_fd())? == CloneFlags::CLONE_NEWNET.bits() {
            Self::trusted(fd)
        } else {
            Err(not_a_netns())
        }
    }

    fn trusted(fd: OwnedFd) -> io::Result<Self> {
        let stat = fstat(&fd)?;
        let id = NetnsId {
            dev: stat.st_dev,
            ino: stat.st_ino,
        };
        Ok(Self {
            fd: Arc::new(fd),
            id,
        })
    }

    /// The kernel's identity of this namespace.
    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// The descriptor, for passing it on.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Where a named namespace is mounted: `/run/netns/NAME`.
    pub fn path_of(name: &str) -> PathBuf {
        Path::new(NAMED_DIR).join(name)
    }

    /// Runs `f` with the calling thread in this namespace, then returns to where the thread was.
    ///
    /// Sockets made and processes started in `f` belong to this namespace. If the way home fails, the process is
    /// aborted: a thread of a pool that silently stays in a pod's namespace would do the next pod's work in this one.
    ///
    /// # Errors
    /// The namespace cannot be entered; `f` has not run then.
    pub fn run<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        self.run_from(&Self::current()?, f)
    }

    /// As [`run`](Self::run), on a thread that is known to be in `home`: finding that out costs more than both moves.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_from<T>(&self, home: &Self, f: impl FnOnce() -> T) -> io::Result<T> {
        debug_assert!(Self::current().is_ok_and(|current| current.id == home.id));
        if home.id == self.id {
            return Ok(f());
        }
        enter(self.as_fd()).map_err(|e| named(e.into(), format_args!("entering {self:?}")))?;
        let _way_home = WayHome(home);
        Ok(f())
    }

    /// Makes a namespace without a name; it lives as long as a descriptor, socket or process holds it. `lo` is down.
    pub fn create_unnamed() -> io::Result<Self> {
        in_fresh_namespace(Self::current)
    }

    /// Makes a named namespace as `ip netns add` does; `lo` stays down.
    ///
    /// # Errors
    /// The name is taken or not a file name, or mounting fails.
    pub fn create_named(name: &str) -> io::Result<Self> {
        let path = checked_path(name)?;
        share_named_dir()?;
        let placeholder = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o444)
            .open(&path);
        placeholder.map_err(|e| named(e, path.display()))?;
        let made = in_fresh_namespace(|| {
            let (nothing, bind) = (None::<&str>, MsFlags::MS_BIND);
            mount(Some(OWN_NETNS), &path, nothing, bind, nothing)?;
            Self::current()
        });
        made.map_err(|e| {
            // The placeholder is ours, nobody else can have opened it as a namespace.
            let _ = fs::remove_file(&path);
            named(e, path.display())
        })
    }

    /// Removes a named namespace; sockets and processes in it keep it alive. One that does not exist is fine.
    pub fn delete_named(name: &str) -> io::Result<()> {
        let path = checked_path(name)?;
        match umount2(&path, MntFlags::MNT_DETACH) {
            // EINVAL: a placeholder that nothing is mounted on.
            Ok(()) | Err(Errno::ENOENT | Errno::EINVAL) => {}
            Err(errno) => return Err(named(errno.into(), path.display())),
        }
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(named(e, path.display())),
            _ => Ok(()),
        }
    }

    /// Names of all named namespaces, sorted.
    pub fn list_named() -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(NAMED_DIR) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|e| named(e, NAMED_DIR))?,
        };
        let mut names = Vec::new();
        for entry in entries {
            names.extend(entry?.file_name().into_string().ok());
        }
        names.sort();
        Ok(names)
    }
}

/// Returns the thread to its namespace, also when the closure panics.
struct WayHome<'a>(&'a Netns);

impl Drop for WayHome<'_> {
    fn drop(&mut self) {
        if let Err(errno) = enter(self.0.as_fd()) {
            eprintln!(
                "fatal: cannot return to network namespace {}: {errno}; aborting rather than working in the wrong one",
                self.0.id
            );
            std::process::abort();
        }
    }
}

#[allow(clippy::disallowed_methods)] // the one place that enters namespaces
fn enter(fd: BorrowedFd<'_>) -> nix::Result<()> {
    nix::sched::setns(fd, CloneFlags::CLONE_NEWNET)
}

/// `NS_GET_NSTYPE` (linux/nsfs.h): the `CLONE_NEW*` flag of a namespace's kind.
fn kind_of_namespace(fd: BorrowedFd<'_>) -> io::Result<i32> {
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    // SAFETY: the descriptor is open for as long as it is borrowed, and this request takes no argument, so the kernel
    // neither reads nor writes memory of this process.
    #[allow(unsafe_code)]
    let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) };
    Errno::result(kind).map_err(Into::into)
}

/// Runs `f` on a thread of its own that has left for a fresh namespace; forking instead would be unsound in a process
/// with other threads.
fn in_fresh_namespace<T: Send>(f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let body = || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        f()
    };
    match std::thread::scope(|scope| scope.spawn(body).join()) {
        Ok(result) => result,
        Err(_) => Err(io::Error::other("the thread that makes a namespace died")),
    }
}

/// Makes `/run/netns` a shared mount, so that names made here are seen, and can be removed, in other mount namespaces.
fn share_named_dir() -> io::Result<()> {
    let context = |e: io::Error| named(e, NAMED_DIR);
    fs::create_dir_all(NAMED_DIR).map_err(context)?;
    let dir = File::open(NAMED_DIR).map_err(context)?;
    // Two processes that both find no mount would stack two mounts; `ip netns add` takes the same lock.
    let _lock = Flock::lock(dir, FlockArg::LockExclusive)
        .map_err(|(_, errno)| context(io::Error::from(errno)))?;
    let change = |source: Option<&str>, flags| {
        let nothing = None::<&str>;
        mount(source, NAMED_DIR, nothing, flags | MsFlags::MS_REC, nothing)
    };
    match change(None, MsFlags::MS_SHARED) {
        // Not a mount point.
        Err(Errno::EINVAL) => change(Some(NAMED_DIR), MsFlags::MS_BIND)
            .and_then(|()| change(None, MsFlags::MS_SHARED)),
        other => other,
    }
    .map_err(|errno| context(errno.into()))
}

fn checked_path(name: &str) -> io::Result<PathBuf> {
    let bad = name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']);
    if bad {
        let message = format!("`{name}` cannot be the name of a network namespace");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    Ok(Netns::path_of(name))
}

fn not_a_netns() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "not a network namespace")
}

fn named(error: io::Error, what: impl fmt::Display) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

#[cfg(test)]
mod tests;
