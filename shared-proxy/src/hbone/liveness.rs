//! Finds dead connections by HTTP/2 PING.

use std::future::poll_fn;

use h2::{Ping, PingPong};
use tokio::time::{sleep, timeout};

use super::HboneConfig;

/// Ends when the peer has left a PING unanswered for too long, or the connection is closed.
pub(super) async fn until_dead(mut pings: PingPong, config: &HboneConfig) {
    loop {
        sleep(config.ping_interval).await;
        if pings.send_ping(Ping::opaque()).is_err() {
            return;
        }
        let answer = poll_fn(|cx| pings.poll_pong(cx));
        match timeout(config.ping_timeout, answer).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}
