//! Two nodes joined by a cable; on each a proxy and pods with /32 routes over veth pairs.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Sub;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use host_net::dump::dump;
use host_net::engine;
use host_net::journal::Journal;
use host_net::netns::Netns;
use host_net::plan::{OverlayKind, Phase, Place, Plan};
use node_redirect::plan::{self, Flow, HostFacts, PodFacts, ProxyFacts};
use node_redirect::scope::{NodeScope, NodeScopeConfig, SameNode};
use shared_proxy::capture::LocalWorkload;
use tempfile::TempDir;
use tokio::io::BufReader;
use tokio::net::TcpSocket;
use tokio::task::JoinSet;

use crate::PORT;
use crate::relay::{self, Log, Seen};
use crate::traffic::{Connection, ping_once, serve_echo};

/// One namespace of the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pod {
    pub netns: &'static str,
    pub ip: Ipv4Addr,
}

const fn pod(netns: &'static str, node: u8, last: u8) -> Pod {
    Pod {
        netns,
        ip: Ipv4Addr::new(10, 244, node, last),
    }
}

pub const HOST_1: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 1);
const HOST_2: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 1);
pub const UPLINK_1: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 1);
const UPLINK_2: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 2);
pub const H1: Pod = pod("h1", 1, 1);
const H2: Pod = pod("h2", 2, 1);
pub const Z1: Pod = pod("z1", 1, 2);
pub const Z2: Pod = pod("z2", 2, 2);
/// Captured, node 1.
pub const A: Pod = pod("a", 1, 4);
/// Captured, node 2.
pub const B: Pod = pod("b", 2, 4);
/// Captured, node 1.
pub const C: Pod = pod("c", 1, 5);
/// Not captured, node 2.
pub const U: Pod = pod("u", 2, 6);
/// Not captured, node 1.
pub const V: Pod = pod("v", 1, 6);
pub const MESH: [Pod; 3] = [A, B, C];
/// A service with one endpoint, B.
pub const VIP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), 80);
pub const NODE_PORT: u16 = 30080;

const MTU: u32 = 1450;

pub struct Lab {
    prefix: String,
    flow: Flow,
    log: Log,
    tasks: Vec<JoinSet<()>>,
    pod_a: Plan,
    journals: TempDir,
    /// Kernel state before any plan.
    pub untouched: Vec<String>,
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.tasks.clear();
        for name in ["h1", "h2", "z1", "z2", "a", "b", "c", "u", "v"] {
            let _ = Netns::delete_named(&format!("{}{name}", self.prefix));
        }
    }
}

impl Lab {
    /// Namespaces, links, plans, relays and echo servers.
    pub async fn up(flow: Flow, same_node: SameNode) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let mut lab = Self {
            prefix: format!("nrf{}-{number}-", std::process::id()),
            flow,
            log: Log::default(),
            tasks: Vec::new(),
            pod_a: plan::pod(&pod_facts(A, false), Phase::Active),
            journals: tempfile::tempdir().unwrap(),
            untouched: Vec::new(),
        };
        lab.cables();
        lab.untouched = lab.state().await;
        for (node, uplink, proxy, pods) in nodes() {
            let scope = NodeScope::new(
                lab.netns(proxy.netns),
                NodeScopeConfig {
                    flow,
                    same_node,
                    local_addresses: vec![node.ip.into(), uplink.into()],
                },
            );
            for pod in pods {
                scope.announce(LocalWorkload {
                    uid: pod.netns.into(),
                    name: pod.netns.into(),
                    namespace: "default".into(),
                    service_account: "default".into(),
                    addresses: [IpAddr::V4(pod.ip)].into(),
                });
            }
            lab.tasks
                .push(relay::start(Arc::new(scope), Arc::clone(&lab.log)));
            lab.make(proxy.netns, &plan::proxy(&proxy_facts(node, proxy), flow))
                .await;
            lab.make(node.netns, &plan::host(&host_facts(node, proxy), flow))
                .await;
            for pod in pods {
                lab.make(
                    node.netns,
                    &plan::pod(&pod_facts(*pod, false), Phase::Active),
                )
                .await;
            }
        }
        let mut servers = JoinSet::new();
        for pod in [A, B, C, U, V] {
            let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT));
            let listener = lab.netns(pod.netns).run(|| {
                let socket = TcpSocket::new_v4()?;
                socket.set_reuseaddr(true)?;
                socket.bind(address)?;
                socket.listen(64)
            });
            servers.spawn(serve_echo(listener.unwrap().unwrap()));
        }
        lab.tasks.push(servers);
        lab
    }

    /// Moves pod A, on node 1, to another phase; `live`: as a pod that was running before.
    pub async fn pod_phase(&mut self, phase: Phase, live: bool) {
        let to = plan::pod(&pod_facts(A, live), phase);
        let from = std::mem::replace(&mut self.pod_a, to.clone());
        self.apply(H1.netns, &from, &to).await;
    }

    async fn make(&self, short: &'static str, plan: &Plan) {
        self.apply(short, &Plan::empty(plan.name.clone()), plan)
            .await;
    }

    /// Applies a change and checks that the kernel has all of it, in order.
    async fn apply(&self, short: &'static str, from: &Plan, to: &Plan) {
        let (place, journal) = self.place(short);
        engine::apply(&place, from, to, &journal).await.unwrap();
        assert_eq!(engine::inspect(&place, to).await.unwrap(), []);
    }

    /// A namespace as a place, with a journal of its own: both nodes have plans of the same names.
    fn place(&self, short: &'static str) -> (Place, Journal) {
        let place = Place {
            label: short.to_owned(),
            netns: self.netns(short),
        };
        let journal = Journal::open(self.journals.path().join(short)).unwrap();
        (place, journal)
    }

    /// Takes all plans away, pods first.
    pub async fn remove_plans(&self) {
        for (node, _, proxy, pods) in nodes() {
            let pods = pods.iter().map(|pod| {
                let plan = plan::pod(&pod_facts(*pod, false), Phase::Active);
                (node.netns, plan)
            });
            let shared = [
                (node.netns, plan::host(&host_facts(node, proxy), self.flow)),
                (
                    proxy.netns,
                    plan::proxy(&proxy_facts(node, proxy), self.flow),
                ),
            ];
            for (short, plan) in pods.chain(shared) {
                let (place, journal) = self.place(short);
                let errors = engine::remove(&place, &plan, &journal).await;
                assert!(errors.is_empty(), "{short}: {errors:?}");
            }
        }
    }

    /// Kernel state of nodes and proxies.
    pub async fn state(&self) -> Vec<String> {
        let mut state = Vec::new();
        for (node, _, proxy, _) in nodes() {
            for short in [node.netns, proxy.netns] {
                state.push(dump(&self.netns(short)).await.unwrap().to_string());
            }
        }
        state
    }

    fn name(&self, short: &str) -> String {
        format!("{}{short}", self.prefix)
    }

    pub fn netns(&self, short: &str) -> Netns {
        Netns::open(Netns::path_of(&self.name(short))).unwrap()
    }

    /// Runs a script in a namespace.
    fn sh(&self, short: &str, script: &str) {
        let output = self
            .netns(short)
            .run(|| Command::new("sh").args(["-ec", script]).output())
            .unwrap()
            .unwrap();
        assert!(
            output.status.success(),
            "in {short}: {script}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    fn cables(&self) {
        for short in ["h1", "h2", "z1", "z2", "a", "b", "c", "u", "v"] {
            Netns::create_named(&self.name(short)).unwrap();
            // Strict: the plans have to loosen what they need.
            self.sh(
                short,
                "ip link set lo up
                 echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad
                 echo 1 > /proc/sys/net/ipv4/conf/all/rp_filter
                 echo 1 > /proc/sys/net/ipv4/conf/default/rp_filter",
            );
        }
        let peer = self.name("h2");
        self.sh(
            "h1",
            &format!("ip link add up0 type veth peer name up0 netns {peer}"),
        );
        let nodes = [
            (
                H1,
                [Z1, A, C, V].as_slice(),
                UPLINK_1,
                UPLINK_2,
                "10.244.2.0/24",
            ),
            (H2, &[Z2, B, U], UPLINK_2, UPLINK_1, "10.244.1.0/24"),
        ];
        for (node, pods, own, other, remote) in nodes {
            self.sh(
                node.netns,
                &format!(
                    "echo 1 > /proc/sys/net/ipv4/ip_forward
                     ip addr add {own}/24 dev up0; ip link set up0 up
                     ip route add {remote} via {other}; ip route add default via {other}
                     iptables -t nat -A PREROUTING -d {}/32 -p tcp --dport {} -j DNAT --to-destination {}:{PORT}",
                    VIP.ip(), VIP.port(), B.ip
                ),
            );
            for pod in pods {
                let (name, ip, host) = (pod.netns, pod.ip, node.ip);
                self.sh(
                    node.netns,
                    &format!(
                        "ip link add v{name} type veth peer name eth0 netns {}
                         ip addr add {host}/32 dev v{name}; ip link set v{name} up
                         ip route add {ip}/32 dev v{name} scope link src {host}",
                        self.name(name)
                    ),
                );
                self.sh(
                    name,
                    &format!(
                        "ip addr add {ip}/32 dev eth0; ip link set eth0 up
                         ip route add {host} dev eth0 scope link; ip route add default via {host}"
                    ),
                );
            }
        }
        // Nobody but captured traffic speaks on the tunnels, so that packets can be counted.
        for short in ["h1", "h2", "z1", "z2"] {
            self.sh(
                short,
                "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6",
            );
        }
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.log.lock().unwrap().clone()
    }

    pub fn forget_seen(&self) {
        self.log.lock().unwrap().clear();
    }

    pub async fn connect(&self, from: &str, to: SocketAddr) -> io::Result<Connection> {
        let socket = self.netns(from).run(TcpSocket::new_v4)??;
        Ok(Connection {
            stream: BufReader::new(socket.connect(to).await?),
        })
    }
}

impl Lab {
    /// What a node port of node 1 does to connections, as kube-proxy would.
    pub fn node_port_to(&self, pod: Pod) {
        self.sh(
            "h1",
            &format!(
                "iptables -t nat -A PREROUTING -d {UPLINK_1}/32 -p tcp --dport {NODE_PORT} -j DNAT --to-destination {}:{PORT}
                 iptables -t nat -A POSTROUTING -p tcp -d {} -m conntrack --ctstate DNAT -j MASQUERADE",
                pod.ip, pod.ip
            ),
        );
    }

    pub fn uplink_mtu(&self, mtu: u32) {
        for node in [H1, H2] {
            self.sh(node.netns, &format!("ip link set up0 mtu {mtu}"));
        }
    }

    pub fn flush_conntrack(&self) {
        for node in [H1, H2] {
            self.sh(node.netns, "conntrack -F 2>/dev/null");
        }
    }

    /// Whether `from` gets an answer to one of two pings.
    pub fn ping(&self, from: Pod, to: impl Into<IpAddr>) -> bool {
        let to = to.into();
        (0..2).any(|_| {
            self.netns(from.netns)
                .run(|| ping_once(to))
                .unwrap()
                .is_ok_and(|answered| answered)
        })
    }

    /// IPv6 between the pods of node 1 and the node; an address is made from the IPv4 one.
    pub fn ipv6_on_node_1(&self) {
        self.sh("h1", "echo 1 > /proc/sys/net/ipv6/conf/all/forwarding");
        for pod in [A, C, V] {
            let (name, address) = (pod.netns, ipv6(pod));
            self.sh(
                "h1",
                &format!(
                    "ip addr add fe80::1/64 dev v{name} nodad; ip -6 route add {address}/128 dev v{name}"
                ),
            );
            self.sh(
                name,
                &format!(
                    "ip addr add {address}/128 dev eth0 nodad; ip -6 route add default via fe80::1 dev eth0"
                ),
            );
        }
        self.sh("h1", &format!("ip addr add {}/128 dev lo", ipv6(H1)));
    }

    pub fn counters(&self) -> Counters {
        let of = |short: &str, device: &str| {
            let text = self
                .netns(short)
                .run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))
                .unwrap()
                .unwrap();
            let line = text
                .lines()
                .find_map(|line| line.trim().strip_prefix(&format!("{device}:")))
                .unwrap();
            let field: Vec<u64> = line
                .split_whitespace()
                .map(|f| f.parse().unwrap())
                .collect();
            Device {
                from_proxy: Amount {
                    bytes: field[0],
                    packets: field[1],
                },
                to_proxy: Amount {
                    bytes: field[8],
                    packets: field[9],
                },
            }
        };
        Counters {
            in_1: of("h1", "istioin"),
            out_1: of("h1", "istioout"),
            in_2: of("h2", "istioin"),
            out_2: of("h2", "istioout"),
            proxy_1_lo: of("z1", "lo"),
        }
    }
}

/// Node, its address on the cable, its proxy and its captured pods.
fn nodes() -> [(Pod, Ipv4Addr, Pod, &'static [Pod]); 2] {
    [(H1, UPLINK_1, Z1, &[A, C]), (H2, UPLINK_2, Z2, &[B])]
}

fn host_facts(node: Pod, proxy: Pod) -> HostFacts {
    HostFacts {
        proxy_ip: proxy.ip,
        proxy_veth: format!("v{}", proxy.netns),
        host_ip: node.ip,
        overlay: OverlayKind::Vxlan,
        port: 6081,
        mtu: MTU,
        main_has_default_route: true,
        ipv6: true,
        ends6: None,
        dns: false,
    }
}

fn proxy_facts(node: Pod, proxy: Pod) -> ProxyFacts {
    ProxyFacts {
        proxy_ip: proxy.ip,
        host_ip: node.ip,
        device: "eth0".to_owned(),
        overlay: OverlayKind::Vxlan,
        port: 6081,
        mtu: MTU,
        ends6: None,
        dns: false,
    }
}

fn pod_facts(pod: Pod, live: bool) -> PodFacts {
    PodFacts {
        uid: format!("uid-{}", pod.netns),
        addresses: vec![pod.ip.into()],
        veth: format!("v{}", pod.netns),
        host_ip: if pod.ip.octets()[2] == 1 {
            HOST_1
        } else {
            HOST_2
        },
        ends6: None,
        main_has_default_route: true,
        live,
        ipv6: true,
        dns_exempt: false,
    }
}

/// The pod's IPv6 address once [`Lab::ipv6_on_node_1`] ran.
pub fn ipv6(pod: Pod) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, u16::from(pod.ip.octets()[3]))
}

/// Packets and bytes of payload with headers.
#[derive(Debug, Clone, Copy)]
pub struct Amount {
    pub packets: u64,
    pub bytes: u64,
}

/// A device of the node, by direction; of `lo`, both are the same.
#[derive(Debug, Clone, Copy)]
pub struct Device {
    pub to_proxy: Amount,
    pub from_proxy: Amount,
}

/// The tunnels of both nodes, and the lo of proxy 1.
#[derive(Debug, Clone, Copy)]
pub struct Counters {
    pub in_1: Device,
    pub out_1: Device,
    pub in_2: Device,
    pub out_2: Device,
    pub proxy_1_lo: Device,
}

impl Sub for Amount {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            packets: self.packets - before.packets,
            bytes: self.bytes - before.bytes,
        }
    }
}

impl Sub for Device {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            to_proxy: self.to_proxy - before.to_proxy,
            from_proxy: self.from_proxy - before.from_proxy,
        }
    }
}

impl Sub for Counters {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            in_1: self.in_1 - before.in_1,
            out_1: self.out_1 - before.out_1,
            in_2: self.in_2 - before.in_2,
            out_2: self.out_2 - before.out_2,
            proxy_1_lo: self.proxy_1_lo - before.proxy_1_lo,
        }
    }
}
