//! One node with pods on /32 routes over veth pairs.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use host_net::dump::dump;
use host_net::engine;
use host_net::journal::Journal;
use host_net::netns::Netns;
use host_net::plan::{Phase, Place, Plan};
use inpod_redirect::extent::Extent;
use inpod_redirect::plan::{self, PodFacts, Style};
use inpod_redirect::scope::InpodScope;
use shared_proxy::capture::LocalWorkload;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;

use crate::relay::{self, Log, Seen};

/// Port of the echo servers.
pub const PORT: u16 = 8080;

/// One namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pod {
    pub netns: &'static str,
    pub ip: Ipv4Addr,
}

const fn pod(netns: &'static str, last: u8) -> Pod {
    Pod {
        netns,
        ip: Ipv4Addr::new(10, 244, 1, last),
    }
}

/// The node.
pub const H: Pod = pod("h", 1);
/// Pods that tests enrol.
pub const A: Pod = pod("a", 4);
pub const C: Pod = pod("c", 5);
/// A pod that no test enrols.
pub const V: Pod = pod("v", 6);
/// A service with one endpoint, A.
pub const VIP_OF_A: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), 80);

pub struct Node {
    prefix: String,
    log: Log,
    servers: JoinSet<()>,
    /// Plan in the pod, by namespace.
    enrolled: BTreeMap<&'static str, Plan>,
    relays: BTreeMap<&'static str, JoinSet<()>>,
    journals: TempDir,
    /// Rules of the pods that are enrolled from here on.
    pub style: Style,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.relays.clear();
        self.servers.abort_all();
        for pod in [H, A, C, V] {
            let _ = Netns::delete_named(&format!("{}{}", self.prefix, pod.netns));
        }
    }
}

impl Node {
    /// Namespaces, links and echo servers.
    pub fn up(style: Style) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let mut node = Self {
            prefix: format!("irc{}-{number}-", std::process::id()),
            log: Log::default(),
            servers: JoinSet::new(),
            enrolled: BTreeMap::new(),
            relays: BTreeMap::new(),
            journals: tempfile::tempdir().unwrap(),
            style,
        };
        node.cables();
        for pod in [A, C, V] {
            let listener = node.netns(pod).run(|| {
                let socket = TcpSocket::new_v6()?;
                socket.set_reuseaddr(true)?;
                socket.bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT)))?;
                socket.listen(64)
            });
            node.servers.spawn(serve_echo(listener.unwrap().unwrap()));
        }
        node
    }

    fn name(&self, pod: Pod) -> String {
        format!("{}{}", self.prefix, pod.netns)
    }

    fn netns(&self, pod: Pod) -> Netns {
        Netns::open(Netns::path_of(&self.name(pod))).unwrap()
    }

    fn sh(&self, pod: Pod, script: &str) {
        let output = self
            .netns(pod)
            .run(|| Command::new("sh").args(["-ec", script]).output())
            .unwrap()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "in {}: {stderr}", pod.netns);
    }

    fn cables(&self) {
        for pod in [H, A, C, V] {
            Netns::create_named(&self.name(pod)).unwrap();
            // Strict: the capture needs nothing loosened.
            self.sh(
                pod,
                "ip link set lo up
                 echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad
                 echo 1 > /proc/sys/net/ipv4/conf/all/rp_filter",
            );
        }
        self.sh(H, "echo 1 > /proc/sys/net/ipv4/ip_forward");
        for pod in [A, C, V] {
            let (name, ip, host) = (pod.netns, pod.ip, H.ip);
            self.sh(
                H,
                &format!(
                    "ip link add v{name} type veth peer name eth0 netns {}
                     ip addr add {host}/32 dev v{name}; ip link set v{name} up
                     ip route add {ip}/32 dev v{name} scope link src {host}",
                    self.name(pod)
                ),
            );
            self.sh(
                pod,
                &format!(
                    "ip addr add {ip}/32 dev eth0; ip link set eth0 up
                     ip route add {host} dev eth0 scope link; ip route add default via {host}"
                ),
            );
        }
    }

    /// IPv6 between the pods.
    pub fn ipv6(&self) {
        self.sh(H, "echo 1 > /proc/sys/net/ipv6/conf/all/forwarding");
        for pod in [A, C, V] {
            let (name, address) = (pod.netns, ipv6(pod));
            self.sh(
                H,
                &format!(
                    "ip addr add fe80::1/64 dev v{name} nodad; ip -6 route add {address}/128 dev v{name}"
                ),
            );
            self.sh(
                pod,
                &format!(
                    "ip addr add {address}/128 dev eth0 nodad; ip -6 route add default via fe80::1 dev eth0"
                ),
            );
        }
    }

    /// Moves a pod to a phase; listeners first, rules last.
    pub async fn enrol(&mut self, pod: Pod, phase: Phase) {
        if !self.relays.contains_key(pod.netns) {
            let workload = LocalWorkload {
                uid: pod.netns.into(),
                name: pod.netns.into(),
                namespace: "default".into(),
                service_account: "default".into(),
                addresses: [IpAddr::V4(pod.ip)].into(),
            };
            let own = Netns::current().unwrap();
            let scope = InpodScope::new(self.netns(pod), workload, &own).unwrap();
            let relay = relay::start(Arc::new(scope), Arc::clone(&self.log));
            self.relays.insert(pod.netns, relay);
            self.apply(H, &Plan::empty("host-inpod"), &plan::host(true))
                .await;
            let host_pod = plan::host_pod(&facts(pod, self.style), phase);
            self.apply(H, &Plan::empty(host_pod.name.clone()), &host_pod)
                .await;
        }
        let to = plan::pod(&facts(pod, self.style), phase);
        let from = self
            .enrolled
            .insert(pod.netns, to.clone())
            .unwrap_or_else(|| Plan::empty(to.name.clone()));
        if let Some(between) = plan::between(&from, &to) {
            self.apply(pod, &from, &between).await;
        }
        self.apply(pod, &from, &to).await;
    }

    fn place(&self, pod: Pod) -> (Place, Journal) {
        let place = Place {
            label: pod.netns.to_owned(),
            netns: self.netns(pod),
        };
        (place, Journal::open(self.journals.path()).unwrap())
    }

    async fn apply(&self, pod: Pod, from: &Plan, to: &Plan) {
        let (place, journal) = self.place(pod);
        engine::apply(&place, from, to, &journal).await.unwrap();
        assert_eq!(engine::inspect(&place, to).await.unwrap(), []);
    }

    /// Unenrols pod A and takes the node's objects away.
    pub async fn remove_plans(&mut self) {
        let in_pod = self.enrolled.remove(A.netns).unwrap();
        for (at, plan) in [
            (A, in_pod),
            (H, plan::host_pod(&facts(A, self.style), Phase::Active)),
            (H, plan::host(true)),
        ] {
            let (place, journal) = self.place(at);
            let errors = engine::remove(&place, &plan, &journal).await;
            assert!(errors.is_empty(), "{}: {errors:?}", at.netns);
        }
        self.relays.remove(A.netns);
    }

    /// Kernel state of the node and of pod A.
    pub async fn state(&self) -> Vec<String> {
        let mut state = Vec::new();
        for pod in [H, A] {
            state.push(dump(&self.netns(pod)).await.unwrap().to_string());
        }
        state
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.log.lock().unwrap().clone()
    }

    pub fn forget_seen(&self) {
        self.log.lock().unwrap().clear();
    }

    pub async fn connect(&self, from: Pod, to: SocketAddr) -> io::Result<Connection> {
        let socket = self.netns(from).run(|| match to {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        })??;
        Ok(Connection {
            stream: BufReader::new(socket.connect(to).await?),
        })
    }
}

fn facts(pod: Pod, style: Style) -> PodFacts {
    PodFacts {
        uid: format!("uid-{}", pod.netns),
        addresses: vec![pod.ip.into()],
        ipv6: true,
        dns: false,
        live: true,
        style,
        extent: Extent::default(),
    }
}

/// The pod's IPv6 address once [`Node::ipv6`] ran.
pub fn ipv6(pod: Pod) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, u16::from(pod.ip.octets()[3]))
}

/// Greets each connection with the address it sees, then sends back what it gets.
async fn serve_echo(listener: TcpListener) {
    let mut connections = JoinSet::new();
    while let Ok((mut stream, peer)) = listener.accept().await {
        connections.spawn(async move {
            let greeting = format!("{}\n", peer.ip().to_canonical());
            if stream.write_all(greeting.as_bytes()).await.is_ok() {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            }
        });
    }
}

/// The client's end of a connection to an echo server.
pub struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    /// Whom the server sees.
    pub async fn greeting(&mut self) -> io::Result<IpAddr> {
        let mut line = String::new();
        self.stream.read_line(&mut line).await?;
        line.trim_end().parse().map_err(io::Error::other)
    }

    /// Sends `size` bytes and gets the same back.
    pub async fn echo(&mut self, size: usize) -> io::Result<()> {
        let sent: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
        let mut received = vec![0; size];
        let (mut read, mut write) = tokio::io::split(&mut self.stream);
        tokio::try_join!(write.write_all(&sent), read.read_exact(&mut received))?;
        if sent == received {
            Ok(())
        } else {
            Err(io::Error::other("not the bytes that were sent"))
        }
    }
}
