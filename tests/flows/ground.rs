//! A lab of one capture with everything that the flows need: services, node ports, servers on nodes, taps.

use std::mem::ManuallyDrop;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use host_net::netns::Netns;
use inpod_redirect::facts::{PROBE_ADDRESS, PROBE_ADDRESS6};
use lab::standing::Daemon;
use lab::topology::workloads::LocalXds;
use lab::topology::{APPLICATION_PORT, OUTSIDE, SERVICE_PORT, ipv6};
use lab::traffic::{self, Check, ClientOptions, Outcome};
use serde_json::Value;

use super::column::Column;
use super::guest::{BRIDGE, Guest};
use super::rows::{GATEWAY, GUEST, GUESTED, PORT_TO_A, PORT_TO_A_LOCAL, PORT_TO_B, Path, Seen, To};
use crate::harness::observe::LogMark;
use crate::harness::state::Changed;
use crate::harness::{self, Scene, Stage, eventually, own};

/// Services with one endpoint each: name, cluster address, pod.
const SERVICES: [(&str, Ipv4Addr, &str); 3] = [
    ("far", Ipv4Addr::new(10, 96, 0, 21), "pod2-1"),
    ("near", Ipv4Addr::new(10, 96, 0, 22), "pod1-2"),
    ("own", Ipv4Addr::new(10, 96, 0, 23), "pod1-1"),
];
/// Where a node-local DNS server listens.
const LINK_LOCAL: Ipv4Addr = Ipv4Addr::new(169, 254, 20, 10);
/// The proxy's metrics page.
const METRICS_PORT: u16 = 15020;
/// How long a check may take that has to work.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How long a check may take that must not.
pub const IMPATIENCE: Duration = Duration::from_millis(2500);
/// How long the lines of a connection may take to appear.
const LOGGED_WITHIN: Duration = Duration::from_secs(30);

/// A lab of one capture.
pub struct Ground<'a> {
    pub scene: &'a Scene,
    v6: bool,
    guest: Guest,
    ports: AtomicU16,
    /// Never put back: the lab goes when its flows are done, and by then without a proxy to tell.
    _services: ManuallyDrop<Changed<'a>>,
}

/// What the proxies said of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Leg {
    OutboundPlain,
    OutboundTunnel,
    InboundPlain,
    InboundTunnel,
}

/// The lab itself.
pub fn lab(column: &Column) -> Scene {
    own(&column.spec())
}

impl<'a> Ground<'a> {
    /// Adds services, node ports, servers, a guest and a gateway.
    pub fn prepare(scene: &'a Scene, column: &Column) -> Self {
        let v6 = column.v6;
        let guest = Guest::inside(scene, GUESTED);
        enrol_again(scene, GUESTED, &["--virtual-interfaces", BRIDGE]);
        if !column.is_node() {
            enrol_again(scene, GATEWAY, &["--bypass-inbound-capture"]);
        }
        let rules = service_rules(scene);
        for node in ["node1", "node2"] {
            script(scene, node, &rules);
            if v6 {
                let rules = ipv6::rules(&rules).replace("iptables", "ip6tables");
                script(scene, node, &rules);
            }
            scene.serve(node, APPLICATION_PORT);
        }
        script(
            scene,
            "node1",
            &format!("ip address add {LINK_LOCAL}/32 dev lo"),
        );
        if v6 {
            let twin = ipv6::twin(LINK_LOCAL);
            let add = format!("ip address add {twin}/128 dev lo nodad");
            script(scene, "node1", &add);
        }
        Self {
            scene,
            v6,
            guest,
            ports: AtomicU16::new(61_000),
            _services: ManuallyDrop::new(scene.with_state(|state| add_services(state, v6))),
        }
    }

    /// The namespace of a box.
    pub fn netns(&self, target: &str) -> Netns {
        if target == GUEST {
            return self.guest.netns.clone();
        }
        self.scene.lab.netns(target).unwrap()
    }

    /// An address, or the one of the same box in the family of the flows.
    fn own_family(&self, address: Ipv4Addr) -> IpAddr {
        match (self.v6, address) {
            (false, address) => address.into(),
            (true, Ipv4Addr::LOCALHOST) => Ipv6Addr::LOCALHOST.into(),
            (true, address) => ipv6::twin(address).into(),
        }
    }

    /// The address of a box as others call it.
    pub fn address(&self, target: &str) -> IpAddr {
        let topology = self.scene.lab.topology();
        let node = topology.nodes.iter().find(|node| node.name == target);
        self.own_family(match (target, node) {
            ("out", _) => OUTSIDE,
            (_, Some(node)) => node.address,
            _ => self.scene.ip(target),
        })
    }

    /// Where a node-local DNS server listens.
    pub fn node_dns(&self) -> IpAddr {
        self.own_family(LINK_LOCAL)
    }

    /// Where a client connects to.
    pub fn destination(&self, from: &str, to: To) -> SocketAddr {
        let topology = self.scene.lab.topology();
        let node = |index: u8| topology.node(index).unwrap();
        let (address, port) = match to {
            To::Application(target) => return (self.address(target), APPLICATION_PORT).into(),
            To::Service(name) => {
                let service = SERVICES.iter().find(|service| service.0 == name);
                (service.unwrap().1, SERVICE_PORT)
            }
            To::NodePort(index, port) if from == "out" => (node(index).outside_address, port),
            To::NodePort(index, port) => (node(index).address, port),
            To::OnNode("gateway") => (node(1).pod_gateway, APPLICATION_PORT),
            To::OnNode("address") => (node(1).address, APPLICATION_PORT),
            To::OnNode("uplink") => (node(1).outside_address, APPLICATION_PORT),
            To::OnNode(_) => (LINK_LOCAL, APPLICATION_PORT),
            To::OnOtherNode => (node(2).address, APPLICATION_PORT),
            To::Loopback => (Ipv4Addr::LOCALHOST, APPLICATION_PORT),
            // The proxy's pages are served by IPv4.
            To::Metrics(index) => return (node(index).proxy_ip, METRICS_PORT).into(),
        };
        (self.own_family(address), port).into()
    }

    /// The address that a word for one stands for.
    pub fn who(&self, seen: Seen) -> Option<IpAddr> {
        let topology = self.scene.lab.topology();
        let node = |index: u8| topology.node(index).unwrap();
        let address = match seen {
            Seen::Pod(pod) => self.scene.ip(pod),
            Seen::Gateway(index) => node(index).pod_gateway,
            Seen::Node(index) => node(index).address,
            Seen::Uplink(index) => node(index).outside_address,
            Seen::Outside => node(1).outside_gateway,
            Seen::Probe if self.v6 => return Some(PROBE_ADDRESS6.into()),
            Seen::Probe => PROBE_ADDRESS,
            Seen::Proxy(index) => node(index).proxy_ip,
            Seen::Loopback => Ipv4Addr::LOCALHOST,
            Seen::Unknown => return None,
        };
        Some(self.own_family(address))
    }

    /// Makes a check from a box, in this thread.
    pub fn attempt(&self, from: &str, to: SocketAddr, check: Check, limit: Duration) -> Outcome {
        let options = ClientOptions {
            to,
            timeout_ms: u64::try_from(limit.as_millis()).unwrap(),
            from_port: Some(self.ports.fetch_add(1, Ordering::Relaxed)),
            check,
        };
        let checked = self.netns(from).run(|| traffic::check(&options));
        checked.unwrap().unwrap()
    }

    /// The places in the logs of both proxies that the next lines come after.
    pub fn marks(&self) -> [LogMark; 2] {
        [1, 2].map(|node| self.scene.mark(node))
    }

    /// What the proxies had to do with `times` equal connections since `marks`, as a path; each took the same one, once.
    ///
    /// # Errors
    /// What they logged, if that is none of the paths.
    pub fn path(
        &self,
        marks: [LogMark; 2],
        wanted: Path,
        times: usize,
        client: Option<&str>,
    ) -> Result<Path, String> {
        let expected: &[Leg] = match wanted {
            Path::Mesh => &[Leg::OutboundTunnel, Leg::InboundTunnel],
            Path::Outbound => &[Leg::OutboundPlain],
            Path::Inbound => &[Leg::InboundPlain],
            Path::OutboundThenInbound => &[Leg::OutboundPlain, Leg::InboundPlain],
            Path::Direct => &[],
        };
        let identity = client.map(|client| self.scene.identity(client));
        let logged = || {
            let lines: Vec<Value> = marks
                .iter()
                .flat_map(|mark| self.scene.access_lines(*mark))
                .collect();
            let legs: Vec<Leg> = lines
                .iter()
                .map(|line| leg(line, identity.as_deref()))
                .collect();
            (legs, lines)
        };
        let deadline = std::time::Instant::now() + LOGGED_WITHIN;
        while logged().0.len() < expected.len() * times && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        let sentinels = self.sentinels();
        let (mut legs, lines) = logged();
        legs.retain({
            let mut lines = lines.iter();
            move |_| {
                let line = lines.next().unwrap();
                !sentinels
                    .iter()
                    .any(|sentinel| line["src.addr"] == **sentinel)
            }
        });
        legs.sort_unstable();
        let mut want: Vec<Leg> = expected
            .iter()
            .flat_map(|leg| std::iter::repeat_n(*leg, times))
            .collect();
        want.sort_unstable();
        if legs == want {
            Ok(wanted)
        } else {
            let lines: Vec<String> = lines.iter().map(Value::to_string).collect();
            let lines = lines.join("\n  ");
            Err(format!("want {want:?}, got {legs:?}:\n  {lines}"))
        }
    }

    /// A connection through each proxy and its line, after everything that came before it. Returns their addresses.
    fn sentinels(&self) -> [String; 2] {
        [(1, "pod1-2", "plain1"), (2, "pod2-2", "plain2")].map(|(node, from, to)| {
            let mark = self.scene.mark(node);
            let to = self.destination(from, To::Application(to));
            let outcome = self.attempt(from, to, Check::Who, PATIENCE);
            assert!(outcome.ok, "a connection after the others: {outcome:#?}");
            let source = outcome.local.unwrap().to_string();
            let line = [("direction", "outbound"), ("src.addr", source.as_str())];
            self.scene.access_line(mark, &line);
            source
        })
    }

    /// Sets the MTU of the link between the nodes.
    pub fn uplink_mtu(&self, mtu: u16) {
        for node in ["node1", "node2"] {
            script(self.scene, node, &format!("ip link set eth0 mtu {mtu}"));
        }
    }

    /// How many packets both nodes could not send on because they were too large.
    pub fn too_large(&self) -> u64 {
        ["node1", "node2"]
            .map(|node| too_large(&self.netns(node), self.v6))
            .iter()
            .sum()
    }

    /// What the agent says to capturing the gateway as one. It changes nothing.
    pub fn gateway_refused(&self) -> Result<(), String> {
        let pod = self.scene.pod(GATEWAY);
        let netns = Netns::path_of(&pod.netns).display().to_string();
        let name = format!("{}/{GATEWAY}", pod.namespace);
        let argv = [
            harness::ambidex(),
            "enrol",
            &name,
            "--netns",
            &netns,
            "--bypass-inbound-capture",
        ];
        let done = self.scene.lab.run("node2", &argv, PATIENCE);
        let done = done.map_err(|error| format!("{error:#}"))?;
        let told = done.stderr.contains("in both directions or not at all");
        match done.code != 0 && told {
            true => Ok(()),
            false => Err(format!("not refused: {}{}", done.stdout, done.stderr)),
        }
    }

    /// Kills the first node's proxy.
    pub fn kill_proxy(&self) {
        self.scene.lab.kill(1, Daemon::Proxy).unwrap();
        let gone = || self.scene.lab.process(1, Daemon::Proxy).is_none();
        eventually("the proxy is gone", PATIENCE, gone);
    }
}

fn leg(line: &Value, client: Option<&str>) -> Leg {
    let tunnel = line.get("dst.hbone_addr").is_some();
    if line["direction"] == "outbound" {
        return if tunnel {
            Leg::OutboundTunnel
        } else {
            Leg::OutboundPlain
        };
    }
    // Not the tunnel of somebody else.
    let proven = client.is_some_and(|client| line["src.identity"] == *client);
    if tunnel && proven {
        Leg::InboundTunnel
    } else {
        Leg::InboundPlain
    }
}

/// From /proc/net/snmp, a line of names and one of numbers, or snmp6, a name and a number in each line.
fn too_large(netns: &Netns, v6: bool) -> u64 {
    let file = if v6 { "snmp6" } else { "snmp" };
    let text = netns.run(|| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")));
    let text = text.unwrap().unwrap();
    if v6 {
        let line = text.lines().find(|line| line.starts_with("Ip6FragFails"));
        return line
            .unwrap()
            .split_whitespace()
            .nth(1)
            .unwrap()
            .parse()
            .unwrap();
    }
    let mut lines = text.lines().filter(|line| line.starts_with("Ip:"));
    let (names, numbers) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names
        .split(' ')
        .position(|word| word == "FragFails")
        .unwrap();
    numbers.split(' ').nth(at).unwrap().parse().unwrap()
}

/// Captures a pod of the lab once more, in another way.
fn enrol_again(scene: &Stage, name: &str, flags: &[&str]) {
    let pod = scene.pod(name);
    let ambidex = |arguments: &[&str]| {
        let argv: Vec<&str> = [harness::ambidex()]
            .iter()
            .chain(arguments)
            .copied()
            .collect();
        let node = format!("node{}", scene.node_of(name));
        let done = scene.lab.run(&node, &argv, PATIENCE);
        done.unwrap().success("ambidex").unwrap();
    };
    let qualified = format!("{}/{name}", pod.namespace);
    ambidex(&["unenrol", &qualified, "--drain", "0s", "--wait"]);
    let netns = Netns::path_of(&pod.netns).display().to_string();
    let identity = [
        "enrol",
        &qualified,
        "--netns",
        &netns,
        "--uid",
        &pod.uid,
        "--service-account",
        &pod.service_account,
    ];
    ambidex(&[&identity, flags].concat());
}

/// Runs a script that must succeed.
pub fn script(scene: &Stage, target: &str, text: &str) {
    let done = scene
        .lab
        .run(target, &["sh", "-ec", text], Duration::from_secs(30));
    done.unwrap().success(text).unwrap();
}

/// What kube-proxy would have for the services and node ports.
fn service_rules(scene: &Stage) -> String {
    let mut rules = String::new();
    let mut add = |matched: &str, pod: &str, masquerade: Option<&str>| {
        let to = scene.at(pod);
        // The last one inserted is the first.
        rules.push_str(&format!(
            "iptables -w -t nat -I {matched} -j DNAT --to-destination {to}\n"
        ));
        if let Some(who) = masquerade {
            rules.push_str(&format!(
                "iptables -w -t nat -I {matched} {who} -j KUBE-MARK-MASQ\n"
            ));
        }
    };
    for (_, address, pod) in SERVICES {
        let matched = format!("KUBE-SERVICES -d {address} -p tcp --dport {SERVICE_PORT}");
        add(&matched, pod, Some("! -s 10.244.0.0/16"));
    }
    for (port, pod, masquerade) in [
        (PORT_TO_A, "pod1-1", Some("")),
        (PORT_TO_B, "pod2-1", Some("")),
        (PORT_TO_A_LOCAL, "pod1-1", None),
    ] {
        let matched = format!("KUBE-NODEPORTS -p tcp --dport {port}");
        add(&matched, pod, masquerade);
    }
    rules
}

fn add_services(state: &mut LocalXds, v6: bool) {
    let pattern = state.services[0].clone();
    for (name, address, pod) in SERVICES {
        let mut service = pattern.clone();
        service.name = name.to_owned();
        service.hostname = format!("{name}.{}.svc.cluster.local", service.namespace);
        service.vips = vec![format!("/{address}")];
        if v6 {
            service.vips.push(format!("/{}", ipv6::twin(address)));
        }
        let key = format!("{}/{}", service.namespace, service.hostname);
        let workload = state.workload_mut(pod).unwrap();
        workload.services.insert(key, pattern.ports.clone());
        state.services.push(service);
    }
}
