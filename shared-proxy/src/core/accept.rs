//! The accept loop of one listener.

use std::io;
use std::time::{Duration, Instant};

use futures_util::FutureExt;

use super::Attachment;
use crate::capture::{Captured, Listener, Role};
use crate::dns::serve::Server as DnsServer;
use crate::drain::Signal;
use crate::{inbound, outbound, probe};

/// Pause after an error that concerns the process (`EMFILE`) and not one connection: accepting at once would fail again.
const PAUSE: Duration = Duration::from_millis(50);
/// At most one line about errors of a listener in this time.
const LOG_EVERY: Duration = Duration::from_secs(5);

/// Accepts until told to drain, and closes the listener then. No error ends it. What waits in the listener's queue at the
/// end is taken, too: the kernel would reset it, also when another proxy listens on the same port.
pub(super) async fn run(
    attachment: Attachment,
    dns: Option<DnsServer>,
    listener: Listener,
    signal: Signal,
) {
    let role = listener.role();
    let mut errors = ErrorLog::default();
    loop {
        let accepted = tokio::select! {
            biased;
            () = signal.draining() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok(captured) => serve(&attachment, dns.as_ref(), role, captured, signal.clone()),
            Err(error) => {
                errors.add(&attachment, &listener, &error);
                if !concerns_one_connection(&error) {
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
    // Once more after the driver has looked at the socket: what has just come is not known before.
    for _ in 0..2 {
        while let Some(Ok(captured)) = listener.accept().now_or_never() {
            serve(&attachment, dns.as_ref(), role, captured, signal.clone());
        }
        tokio::task::yield_now().await;
    }
}

fn serve(
    attachment: &Attachment,
    dns: Option<&DnsServer>,
    role: Role,
    captured: Captured,
    signal: Signal,
) {
    let Some(captured) = attachment.unless_own(role, captured) else {
        return;
    };
    let attachment = attachment.clone();
    match role {
        Role::Outbound if probe::is_probe(&captured) => {
            tokio::spawn(probe::pass_on(attachment, captured));
        }
        Role::Outbound => {
            tokio::spawn(outbound::serve(attachment, captured, signal));
        }
        Role::InboundPlaintext => {
            tokio::spawn(inbound::plaintext::serve(attachment, captured, signal));
        }
        Role::InboundHbone => {
            tokio::spawn(crate::hbone::server::serve(attachment, captured, signal));
        }
        Role::Dns => {
            if let Some(dns) = dns.cloned() {
                tokio::spawn(crate::dns::serve::tcp(dns, captured, signal));
            }
        }
        Role::Socks5 => {
            tokio::spawn(crate::socks5::serve::serve(attachment, captured, signal));
        }
    }
}

fn concerns_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

/// Says once in a while what goes wrong, with how often.
#[derive(Default)]
struct ErrorLog {
    last: Option<Instant>,
    unsaid: u64,
}

impl ErrorLog {
    fn add(&mut self, attachment: &Attachment, listener: &Listener, error: &io::Error) {
        self.unsaid += 1;
        if self.last.is_some_and(|last| last.elapsed() < LOG_EVERY) {
            return;
        }
        tracing::warn!(
            scope = %attachment.scope.id(),
            port = listener.port(),
            errors = self.unsaid,
            %error,
            "accepting a connection failed"
        );
        self.last = Some(Instant::now());
        self.unsaid = 0;
    }
}
