#![allow(clippy::unwrap_used, clippy::expect_used)]

mod agent_side;
mod both_ends;
mod fuzz;
mod proxy_side;
mod wire;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use host_net::netns::Netns;
use prost::Message;
use tokio::time::{sleep, timeout};
use tokio_seqpacket::UnixSeqpacket;
use tokio_seqpacket::ancillary::AncillaryMessageWriter;

use super::client::WorkloadHandler;
use super::messages::*;
use super::transport::{Packet, Transport, TransportError};
use super::{Add, Delayed, Delays, Mode, NodeConfiguration, Release};

/// Longer than any wait of the protocol.
const PATIENCE: Duration = Duration::from_secs(12);

fn info() -> WorkloadInfo {
    WorkloadInfo {
        name: "web-1".to_owned(),
        namespace: "alpha".to_owned(),
        service_account: "web".to_owned(),
    }
}

fn inpod(uid: &str, netns: &Netns) -> Add {
    Add {
        uid: Arc::from(uid),
        info: info(),
        mode: Mode::Inpod,
        addresses: vec!["10.244.1.4".parse().unwrap()],
        guests: false,
        netns: Some(netns.clone()),
    }
}

fn node(uid: &str, address: &str) -> Add {
    Add {
        uid: Arc::from(uid),
        info: info(),
        mode: Mode::Node,
        addresses: vec![address.parse::<IpAddr>().unwrap()],
        guests: false,
        netns: None,
    }
}

/// A directory for one socket, removed with the value.
struct Place {
    _dir: tempfile::TempDir,
    socket: PathBuf,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("run/zds.sock");
    Place { _dir: dir, socket }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, waiting)
        .await
        .unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"));
}

/// A handler that writes down what it is asked.
#[derive(Default)]
struct Recorder {
    calls: Mutex<Vec<String>>,
    failing: Mutex<BTreeSet<String>>,
}

impl Recorder {
    fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }

    fn count(&self, call: &str) -> usize {
        self.calls().iter().filter(|made| *made == call).count()
    }

    fn record(&self, call: String) {
        self.calls.lock().unwrap().push(call);
    }

    fn fail(&self, uid: &str) {
        self.failing.lock().unwrap().insert(uid.to_owned());
    }

    fn recover(&self, uid: &str) {
        self.failing.lock().unwrap().remove(uid);
    }
}

/// More connections than a report names, by both families.
fn delays() -> Delays {
    let one = |number: u16| Delayed {
        client: match number % 2 {
            0 => ([10, 244, 1, 9], number).into(),
            _ => (Ipv6Addr::LOCALHOST, number).into(),
        },
        destination: ([10, 244, 2, 9], 80).into(),
        waited: Duration::from_micros(number.into()),
    };
    Delays::new((1..=1001).map(one).collect(), 1002)
}

impl WorkloadHandler for Recorder {
    async fn add(&self, add: Add) -> Result<(), String> {
        let netns = match add.netns {
            Some(netns) => netns.id().to_string(),
            None => format!("{:?}", add.addresses),
        };
        self.record(format!("add {} {} {netns}", add.uid, add.mode));
        match self.failing.lock().unwrap().contains(&*add.uid) {
            true => Err("no listeners".to_owned()),
            false => Ok(()),
        }
    }

    async fn del(&self, uid: &str, drain: Duration) {
        self.record(format!("del {uid} {drain:?}"));
    }

    async fn keep(&self, uid: &str) {
        self.record(format!("keep {uid}"));
    }

    async fn hold(&self, uid: &str, within: Duration) -> Result<(), String> {
        self.record(format!("hold {uid} {within:?}"));
        Ok(())
    }

    async fn prepare(&self, add: Add) -> Result<(), String> {
        self.record(format!("prepare {} {}", add.uid, add.mode));
        match self.failing.lock().unwrap().contains(&*add.uid) {
            true => Err("no listeners".to_owned()),
            false => Ok(()),
        }
    }

    async fn release(&self, uid: &str, release: Release) -> Delays {
        self.record(format!("release {uid} {release:?}"));
        delays()
    }

    async fn snapshot_sent(&self) {
        self.record("ready".to_owned());
    }

    async fn configure_node(&self, configuration: NodeConfiguration) -> Result<(), String> {
        self.record(format!(
            "configure {} {} {:?}",
            configuration.flow, configuration.same_node, configuration.node_addresses
        ));
        Ok(())
    }

    fn connections(&self, _uid: &str) -> u64 {
        7
    }

    fn disconnected(&self) {
        self.record("disconnected".to_owned());
    }
}

/// One end of a connection that does exactly what a test says.
struct Raw {
    transport: Transport,
}

impl Raw {
    async fn connect(path: &Path) -> Self {
        let socket = UnixSeqpacket::connect(path).await.unwrap();
        Self::over(socket)
    }

    fn over(socket: UnixSeqpacket) -> Self {
        let mut transport = Transport::new(socket);
        transport.allow_extended_packets();
        Self { transport }
    }

    async fn send(&self, message: &impl Message) {
        self.transport.send(message, None).await.unwrap();
    }

    async fn packet(&mut self) -> Result<Packet, TransportError> {
        timeout(PATIENCE, self.transport.receive())
            .await
            .expect("a packet, or the end, in time")
    }

    /// As the proxy: the next request and its descriptors, answered with `error` (empty: success).
    async fn request(&mut self, error: &str) -> (Request, Vec<OwnedFd>) {
        let packet = self.packet().await.unwrap();
        let request: WorkloadRequest = packet.parse().unwrap();
        self.send(&WorkloadResponse::ack(error)).await;
        (request.payload.expect("a known request"), packet.fds)
    }

    /// As the agent: asks, and returns the text of the ack.
    async fn ask(&mut self, request: Request, fd: Option<&Netns>) -> String {
        let request = WorkloadRequest::from(request);
        self.transport
            .send(&request, fd.map(Netns::as_fd))
            .await
            .unwrap();
        self.ack().await
    }

    async fn ack(&mut self) -> String {
        let response: WorkloadResponse = self.packet().await.unwrap().parse().unwrap();
        match response.payload {
            Some(Response::Ack(ack)) => ack.error,
            other => panic!("not an ack: {other:?}"),
        }
    }

    async fn expect_end(&mut self) {
        match self.packet().await {
            Err(TransportError::Closed | TransportError::Io(_)) => {}
            other => panic!("the connection should have been closed, but: {other:?}"),
        }
    }
}

/// Sends bytes that the library would not send.
async fn send_bytes(socket: &UnixSeqpacket, bytes: &[u8], fds: &[impl AsFd]) {
    let mut control = [0; 128];
    let mut ancillary = AncillaryMessageWriter::new(&mut control);
    if !fds.is_empty() {
        ancillary.add_fds(fds.iter().map(AsFd::as_fd)).unwrap();
    }
    socket
        .send_with_ancillary(bytes, &mut ancillary)
        .await
        .unwrap();
}
