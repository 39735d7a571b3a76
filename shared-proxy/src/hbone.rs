//! HBONE: TCP through HTTP/2 CONNECT over mutual TLS.
//!
//! [`client`] opens tunnels and streams, [`server`] accepts them, [`stream`] moves bytes. What both ends agree on, the
//! numbers of HTTP/2, is here.

pub mod authority;
pub(crate) mod baggage;
pub mod client;
#[cfg(test)]
mod fuzz;
mod liveness;
pub mod server;
pub mod stream;
pub mod stream_io;

use std::time::Duration;

use http::HeaderName;

/// Says, to the far end of a tunnel inside a tunnel, from which network it comes: addresses of it mean nothing there.
pub(crate) const FORWARDED_NETWORK: HeaderName = HeaderName::from_static("x-forwarded-network");

/// Who an end is.
pub(crate) const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
/// For whom, and to which name, a stream is opened.
pub(crate) const FORWARDED: HeaderName = HeaderName::from_static("forwarded");

/// HTTP/2 numbers of both ends of a tunnel.
#[derive(Debug, Clone)]
pub struct HboneConfig {
    /// Bytes that may be on their way in one stream before its receiver has taken them.
    ///
    /// Larger is not faster: with 1 MiB, plaintext HTTP/2 over loopback carried twice what it did with 4 MiB, whose
    /// queues do not fit the cache.
    pub stream_window: u32,
    /// The same, for all streams of one connection together. A stream whose application does not read keeps its whole
    /// window; what is left is for the others. So this has to hold a window for each of the streams that a client opens
    /// in a connection, or a few stalled applications stop all their neighbours.
    pub connection_window: u32,
    /// Largest DATA frame that we accept, in bytes; we send what the peer accepts.
    pub max_frame_size: u32,
    /// Bytes of one stream that wait in HTTP/2 to be written to the wire.
    pub max_send_buffer: usize,
    /// What small DATA frames that nobody has taken may cost together, per connection: a frame of L < 256 bytes costs
    /// 256 - L until its stream takes it. Past the budget HTTP/2 closes the connection with every stream in it.
    ///
    /// The automatic budget is half the window, exhausted by 4,000 frames of one byte: a burst of keystrokes that
    /// arrives while the stream's task waits for a processor would kill its neighbours. A frame pins about 300 bytes of
    /// bookkeeping, so 32 MiB (131,000 frames) bound a connection to about 40 MiB, which an authenticated peer reaches
    /// only if it tries: streams take their frames at once, however slow their application is, and copy them together.
    pub data_frame_budget: usize,
    /// Streams that a server accepts in one connection.
    pub max_concurrent_streams: u32,
    /// Longest header list that a client accepts, in bytes.
    pub client_header_list: u32,
    /// Longest header list that a server accepts, in bytes.
    pub server_header_list: u32,
    /// Pause between two PINGs.
    pub ping_interval: Duration,
    /// How long the answer to a PING may take before the connection counts as dead.
    pub ping_timeout: Duration,
    /// Time for TLS and the HTTP/2 preface together.
    pub handshake_timeout: Duration,
}

impl Default for HboneConfig {
    /// The field's limits; windows and frames as measured.
    fn default() -> Self {
        Self {
            stream_window: 1 << 20,
            connection_window: 100 << 20,
            max_frame_size: 256 << 10,
            max_send_buffer: 512 << 10,
            data_frame_budget: 32 << 20,
            max_concurrent_streams: 200,
            client_header_list: 16 << 10,
            server_header_list: 64 << 10,
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            handshake_timeout: Duration::from_secs(10),
        }
    }
}

/// Streams that were reset here and are remembered for a second, so that what is still on its way to them is not taken
/// for an error.
const REMEMBERED_RESETS: usize = 1024;

impl HboneConfig {
    /// HTTP/2 settings of a client.
    pub(crate) fn client_builder(&self) -> h2::client::Builder {
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(self.stream_window)
            .initial_connection_window_size(self.connection_window)
            .max_frame_size(self.max_frame_size)
            .max_send_buffer_size(self.max_send_buffer)
            .max_header_list_size(self.client_header_list)
            .data_frame_budget(self.data_frame_budget)
            // Counted over the whole life of a connection: frames that arrive for streams which were reset and forgotten.
            // The default ends a tunnel, with all its streams, after 1,024 of them. Peers are authenticated, and
            // applications reset connections every day.
            .max_local_error_reset_streams(None)
            .max_concurrent_reset_streams(REMEMBERED_RESETS)
            .enable_push(false);
        builder
    }

    /// HTTP/2 settings of a server.
    pub(crate) fn server_builder(&self) -> h2::server::Builder {
        let mut builder = h2::server::Builder::new();
        builder
            .initial_window_size(self.stream_window)
            .initial_connection_window_size(self.connection_window)
            .max_frame_size(self.max_frame_size)
            .max_send_buffer_size(self.max_send_buffer)
            .max_header_list_size(self.server_header_list)
            .max_concurrent_streams(self.max_concurrent_streams)
            .data_frame_budget(self.data_frame_budget)
            // As for the client.
            .max_local_error_reset_streams(None)
            .max_concurrent_reset_streams(REMEMBERED_RESETS)
            // As many streams as are allowed may be reset before they were looked at: one cut does it.
            .max_pending_accept_reset_streams(self.max_concurrent_streams as usize);
        builder
    }
}
