//! The process's own HTTP pages: admin (15000, loopback), metrics (15020), readiness (15021).
//!
//! They run on a thread and a runtime of their own, so that a data plane whose workers are all busy still answers probes
//! and scrapes. One request per connection, small heads and bodies, few connections at a time: nothing that a client does
//! here costs much memory.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::{Readiness, Telemetry};

mod pages;
mod profile;
#[cfg(test)]
mod tests;

pub use profile::{ProfileError, Profiler};

/// Port of the admin pages (the field's number).
pub const ADMIN_PORT: u16 = 15000;
/// Port of the metrics.
pub const METRICS_PORT: u16 = 15020;
/// Port of the readiness probe.
pub const READINESS_PORT: u16 = 15021;

/// Connections served at a time on each port; more of them wait in the listen queue.
const CONNECTIONS: usize = 64;
/// Largest request head in bytes (hyper's least allowed buffer is 8 KiB).
const HEAD_LIMIT: usize = 16 * 1024;
/// A client must have sent its request head within this time.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// And have read its answer within this one; on the admin port it may wait for a profile in addition.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);

/// The program's log filter, behind `/logging`.
pub trait LogControl: Send + Sync + 'static {
    /// The filter in force, as text.
    fn current(&self) -> String;
    /// Adds directives to the filter; `reset` goes back to the one of the start. The error is shown to the caller.
    fn set(&self, filter: &str) -> Result<(), String>;
}

type Section = Box<dyn Fn() -> Value + Send + Sync>;
type Shutdown = Box<dyn Fn() + Send + Sync>;

/// What the pages show. The program adds what only it knows: sections of the config dump, log control, how to stop.
pub struct Admin {
    telemetry: Arc<Telemetry>,
    readiness: Readiness,
    sections: Vec<(&'static str, Section)>,
    logging: Option<Box<dyn LogControl>>,
    profiles: Option<profile::Profiles>,
    shutdown: Option<Shutdown>,
}

impl std::fmt::Debug for Admin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sections: Vec<_> = self.sections.iter().map(|(name, _)| name).collect();
        f.debug_struct("Admin")
            .field("readiness", &self.readiness)
            .field("sections", &sections)
            .finish_non_exhaustive()
    }
}

impl Admin {
    /// Metrics, readiness, and a config dump with `version` and `connections`.
    pub fn new(telemetry: Arc<Telemetry>, readiness: Readiness) -> Self {
        Self {
            telemetry,
            readiness,
            sections: Vec::new(),
            logging: None,
            profiles: None,
            shutdown: None,
        }
    }

    /// Adds a section to `/config_dump` (`workloads`, `services`, `policies`, `certificates`, `workloadState`, ..). `read`
    /// runs on the admin thread at each request and must not block on the data plane.
    pub fn section(
        mut self,
        name: &'static str,
        read: impl Fn() -> Value + Send + Sync + 'static,
    ) -> Self {
        self.sections.push((name, Box::new(read)));
        self
    }

    /// Makes `/logging` work.
    pub fn logging(mut self, control: impl LogControl) -> Self {
        self.logging = Some(Box::new(control));
        self
    }

    /// Makes `/debug/pprof/*` work.
    pub fn profiles(mut self, profiler: impl Profiler) -> Self {
        self.profiles = Some(profile::Profiles::new(profiler));
        self
    }

    /// Makes `/quitquitquit` work. `stop` only starts the shutdown and returns.
    pub fn on_shutdown(mut self, stop: impl Fn() + Send + Sync + 'static) -> Self {
        self.shutdown = Some(Box::new(stop));
        self
    }
}

/// Where the three servers listen. An unspecified IPv6 address falls back to IPv4 where there is no IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdminAddresses {
    /// Admin pages. They show configuration and stop the process: loopback.
    pub admin: SocketAddr,
    /// Metrics.
    pub metrics: SocketAddr,
    /// Readiness probe.
    pub readiness: SocketAddr,
}

impl Default for AdminAddresses {
    fn default() -> Self {
        let any = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
        Self {
            admin: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), ADMIN_PORT),
            metrics: SocketAddr::new(any, METRICS_PORT),
            readiness: SocketAddr::new(any, READINESS_PORT),
        }
    }
}

/// Bound listeners. Standard ones, because a Tokio listener belongs to the runtime on which it was made.
#[derive(Debug)]
pub struct AdminListeners {
    /// For the admin pages.
    pub admin: TcpListener,
    /// For the metrics.
    pub metrics: TcpListener,
    /// For the readiness probe.
    pub readiness: TcpListener,
    /// The admin pages again, for the command line on this node.
    pub local: Option<UnixListener>,
}

impl AdminListeners {
    /// Binds all three in the network namespace of the calling thread: the process's own, because nobody's captured
    /// traffic arrives here. The error names the address.
    pub fn bind(addresses: &AdminAddresses) -> io::Result<Self> {
        Ok(Self {
            admin: bind(addresses.admin)?,
            metrics: bind(addresses.metrics)?,
            readiness: bind(addresses.readiness)?,
            local: None,
        })
    }
}

// The one place outside a Scope that listens: these ports belong to the process, not to a captured pod.
#[allow(clippy::disallowed_methods)]
fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address)
        .or_else(|error| match address.ip() {
            IpAddr::V6(ip) if ip.is_unspecified() && error.kind() != io::ErrorKind::AddrInUse => {
                TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port()))
            }
            _ => Err(error),
        })
        .map_err(|error| {
            io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"))
        })
}

/// The running servers. Dropping it stops them and waits for their thread.
#[derive(Debug)]
pub struct AdminServer {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Drop for AdminServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic on that thread has been printed; there is nothing to add to it here.
            let _ = thread.join();
        }
    }
}

/// Which pages a port has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Site {
    Admin,
    Metrics,
    Readiness,
}

/// Starts the servers on a thread of their own.
pub fn serve(admin: Admin, listeners: AdminListeners) -> io::Result<AdminServer> {
    let sites = [
        (Site::Admin, listeners.admin),
        (Site::Metrics, listeners.metrics),
        (Site::Readiness, listeners.readiness),
    ];
    for (_, listener) in &sites {
        listener.set_nonblocking(true)?;
    }
    if let Some(local) = &listeners.local {
        local.set_nonblocking(true)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()?;
    let sites = {
        let _context = runtime.enter();
        let mut bound = Vec::with_capacity(sites.len());
        for (site, listener) in sites {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            bound.push((site, Incoming::Tcp(listener)));
        }
        if let Some(local) = listeners.local {
            let listener = tokio::net::UnixListener::from_std(local)?;
            bound.push((Site::Admin, Incoming::Unix(listener)));
        }
        bound
    };
    let (stop, stopped) = oneshot::channel::<()>();
    let thread = thread::Builder::new().name("admin".into()).spawn(move || {
        let admin = Arc::new(admin);
        runtime.block_on(async move {
            for (site, listener) in sites {
                tokio::spawn(accept(site, listener, Arc::clone(&admin)));
            }
            // Ends with an error when the sender is dropped, which is the signal.
            let _ = stopped.await;
        });
        // Without waiting for a profile that is being taken.
        runtime.shutdown_background();
    })?;
    Ok(AdminServer {
        stop: Some(stop),
        thread: Some(thread),
    })
}

/// Where requests come from.
enum Incoming {
    Tcp(tokio::net::TcpListener),
    Unix(tokio::net::UnixListener),
}

async fn accept(site: Site, incoming: Incoming, admin: Arc<Admin>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let accepted = match &incoming {
            Incoming::Tcp(listener) => listener.accept().await.map(|(stream, _)| {
                tokio::spawn(answer(site, stream, Arc::clone(&admin), place));
            }),
            Incoming::Unix(listener) => listener.accept().await.map(|(stream, _)| {
                tokio::spawn(answer(site, stream, Arc::clone(&admin), place));
            }),
        };
        if let Err(error) = accepted {
            tracing::warn!(%error, ?site, "cannot accept a connection to the admin pages");
            // EMFILE would come back at once.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

async fn answer<S>(site: Site, stream: S, admin: Arc<Admin>, place: OwnedSemaphorePermit)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let connection = http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(HEAD_LIMIT)
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(
            TokioIo::new(stream),
            service_fn(|request| pages::answer(site, &admin, request)),
        );
    // Errors are the client's: it went away, or sent nothing sensible and was told so.
    let limit = match site {
        Site::Admin => CONNECTION_TIMEOUT + profile::LONGEST,
        Site::Metrics | Site::Readiness => CONNECTION_TIMEOUT,
    };
    let _ = tokio::time::timeout(limit, connection).await;
    drop(place);
}
