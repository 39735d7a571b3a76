//! The way of a packet as "Deep Dive into Ambient Mesh - Traffic Path" (2022) walks it, typed from there, and how a story is
//! held against it.
//!
//! The article's cluster becomes the lab by [`Names`], and by nothing else.

/// What must be seen beside a station.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// When the packet was on the device.
    Time,
    /// How many packets the rule counted.
    Packets,
    /// Nothing: routes and sets count nothing.
    Nothing,
}

/// Where a station is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Client,
    NearNode,
    NearProxy,
    FarNode,
    FarProxy,
    Application,
}

/// A station: where, on which device (if the article names it), what the article says, and what must be seen there.
#[derive(Debug, Clone, Copy)]
pub struct Station(pub Place, pub &'static str, pub &'static str, pub Seen);

use Place::{Application, Client, FarNode, FarProxy, NearNode, NearProxy};
use Seen::{Nothing, Packets, Time};

/// "Egress traffic interception", then "Ingress traffic interception" of what arrives on the other node.
pub const POD_TO_POD: [Station; 23] = [
    // "1. Initiate traffic from a process in pod"
    Station(Client, "-", "a socket begins a connection", Nothing),
    Station(Client, "eth0", "out by eth0", Time),
    // "2. The traffic flows via the node network and get marks by iptables on the node"
    Station(NearNode, "vethp1", "in by vethp1", Time),
    Station(NearNode, "vethp1", "ipset ztunnel-pods-ips", Nothing),
    Station(
        NearNode,
        "vethp1",
        "-A ztunnel-PREROUTING -p tcp -m set --match-set ztunnel-pods-ips src -j MARK --set-xmark 0x100/0x100",
        Packets,
    ),
    // "3. The traffic is forwarded to the ztunnel pod on current node by the routing table"
    Station(
        NearNode,
        "istioout",
        "101: from all fwmark 0x100/0x100 lookup 101",
        Nothing,
    ),
    Station(
        NearNode,
        "istioout",
        "ip r show table 101: default via 192.168.127.2 dev istioout",
        Nothing,
    ),
    Station(
        NearNode,
        "istioout",
        "mtu 1450, inet 192.168.127.1/30): geneve id 1001 remote",
        Time,
    ),
    Station(
        NearProxy,
        "pistioout",
        "pistioout (mtu 1450, inet 192.168.127.2/30",
        Time,
    ),
    // "4. When the traffic reaches ztunnel, it will go through iptables for TPROXY"
    Station(
        NearProxy,
        "pistioout",
        "-A PREROUTING -i pistioout -p tcp -j TPROXY --on-port 15001 --on-ip 127.0.0.1 --tproxy-mark 0x400/0xfff",
        Packets,
    ),
    // "15001 is the port that Envoy actually listens to and process the pod egress traffic"
    Station(NearProxy, "pistioout", "port 15001", Nothing),
    // "port 15008, this is the port used by ztunnel for L4 traffic tunneling"
    Station(NearProxy, "eth0", "out by eth0", Time),
    Station(FarNode, "eth0", "in by eth0", Time),
    // "103: from all lookup 100", and `ip r get` of the destination.
    Station(FarNode, "istioin", "103: from all lookup 100", Nothing),
    Station(
        FarNode,
        "istioin",
        "10.244.1.7 via 192.168.126.2 dev istioin table 100 src 10.244.1.1",
        Nothing,
    ),
    Station(FarNode, "istioin", "geneve id 1000 remote", Time),
    Station(
        FarProxy,
        "pistioin",
        "pistioin (mtu 1450, inet 192.168.126.2/30",
        Time,
    ),
    Station(
        FarProxy,
        "pistioin",
        "-A PREROUTING -i pistioin -p tcp -m tcp --dport 15008 -j TPROXY --on-port 15008 --on-ip 127.0.0.1 --tproxy-mark 0x400/0xfff",
        Packets,
    ),
    Station(FarProxy, "pistioin", "port 15008", Nothing),
    // "The traffic sent by Envoy does not require special notice": with the client's address, to the application.
    Station(FarProxy, "eth0", "out by eth0", Time),
    Station(FarNode, "vethproxy", "in by vethproxy", Time),
    Station(Application, "eth0", "in by eth0", Time),
    Station(Application, "eth0", "port 8080", Nothing),
];

/// "If you directly access the node via PodIP + pod port, the traffic will be forwarded to port 15006 of ztunnel".
pub const PLAIN_TO_POD: [Station; 5] = [
    Station(NearNode, "istioin", "103: from all lookup 100", Nothing),
    Station(
        NearNode,
        "istioin",
        "10.244.1.7 via 192.168.126.2 dev istioin table 100 src 10.244.1.1",
        Nothing,
    ),
    Station(
        NearProxy,
        "pistioin",
        "pistioin (mtu 1450, inet 192.168.126.2/30",
        Time,
    ),
    Station(
        NearProxy,
        "pistioin",
        "-A PREROUTING -i pistioin -p tcp -j TPROXY --on-port 15006 --on-ip 127.0.0.1 --tproxy-mark 0x400/0xfff",
        Packets,
    ),
    Station(NearProxy, "pistioin", "port 15006", Nothing),
];

/// What the article's cluster is called in a lab.
#[derive(Debug)]
pub struct Names {
    /// Places by [`Place`].
    pub places: [String; 6],
    /// The client's address.
    pub client: String,
    /// For 10.244.1.7.
    pub destination: String,
    /// For its node's 10.244.1.1.
    pub gateway: String,
    /// For `geneve`.
    pub overlay: String,
    /// For vethp1, the article's veth5db63c11.
    pub veth: String,
}

impl Names {
    fn of(&self, text: &str) -> String {
        text.replace("10.244.1.7 ", &format!("{} ", self.destination))
            .replace("src 10.244.1.1", &format!("src {}", self.gateway))
            .replace("geneve", &self.overlay)
            .replace("vethp1", &self.veth)
    }
}

/// A line of a story: place, device, what was seen, what happened.
fn columns(line: &str) -> Option<[&str; 4]> {
    let mut rest = line.strip_prefix("    ")?;
    let mut found = [""; 4];
    for column in &mut found[..3] {
        let (text, more) = rest.split_once("  ")?;
        *column = text;
        rest = more.trim_start();
    }
    found[3] = rest;
    Some(found)
}

fn evident(seen: &str, wanted: Seen) -> bool {
    match wanted {
        Seen::Time => {
            let time = seen
                .strip_prefix('+')
                .and_then(|text| text.strip_suffix(" ms"));
            time.is_some_and(|time| time.parse::<f64>().is_ok())
        }
        Seen::Packets => {
            let count = seen.split_once(" packet").map(|(count, _)| count.parse());
            matches!(count, Some(Ok(1_u64..)))
        }
        Seen::Nothing => true,
    }
}

/// Holds a story against the stations, line by line: each one has to come after the one before, with its evidence. Returns
/// the lines of the stations.
pub fn held(story: &str, stations: &[Station], names: &Names) -> Result<Vec<usize>, String> {
    let lines: Vec<&str> = story.lines().collect();
    let mut at = 0;
    let mut found = Vec::new();
    for Station(place, device, text, seen) in stations {
        let (place, device) = (&names.places[*place as usize], names.of(device));
        let text = names.of(text);
        let is_it = |line: &&str| match columns(line) {
            Some([in_place, on_device, _, what]) => {
                in_place == place && on_device == device && what.contains(&text)
            }
            None => false,
        };
        let next = lines[at..].iter().position(is_it);
        let Some(next) = next else {
            return Err(format!(
                "no {text:?} in {place}, {device}, after line {at}:\n{story}"
            ));
        };
        let line = at + next;
        let beside = columns(lines[line]).unwrap()[2];
        if !evident(beside, *seen) {
            return Err(format!("no {seen:?} beside {text:?} but {beside:?}"));
        }
        found.push(line);
        at = line + 1;
    }
    Ok(found)
}
