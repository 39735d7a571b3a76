//! A container that runs inside a pod, behind a bridge there, and leaves it with the pod's address.
#![allow(dead_code, reason = "each test program uses another part")]

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use host_net::netns::Netns;
use lab::topology::netns_prefix;
use lab::traffic::{self, Check, ClientOptions, Outcome};

use crate::harness::Stage;

/// The bridge, in the pod.
pub const BRIDGE: &str = "br0";

/// What its pod does for it, with the name of its namespace for `GUEST`. IPv6 is made where the pod has any.
const IN_POD: &str = "
ip link add br0 type bridge
ip address add 172.31.7.1/24 dev br0
ip link set br0 up
ip link add guest0 type veth peer name eth0 netns GUEST
ip link set guest0 master br0 up
echo 1 > /proc/sys/net/ipv4/ip_forward
iptables -w -t nat -A POSTROUTING -s 172.31.7.0/24 -o eth0 -j MASQUERADE
if ip -6 route show default | grep -q .; then
  ip address add fd31:7::1/64 dev br0 nodad
  echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
  ip6tables -w -t nat -A POSTROUTING -s fd31:7::/64 -o eth0 -j MASQUERADE
fi
";

/// What it does itself.
const INSIDE: &str = "
ip link set lo up
ip address add 172.31.7.2/24 dev eth0
ip address add fd31:7::2/64 dev eth0 nodad
ip link set eth0 up
ip route add default via 172.31.7.1
ip route add default via fd31:7::1
";

/// A guest. Its namespace goes with the lab.
pub struct Guest {
    /// Its namespace.
    pub netns: Netns,
    /// Its addresses, which nobody outside its pod knows: IPv4 and IPv6.
    pub addresses: [IpAddr; 2],
    ports: AtomicU16,
}

impl Guest {
    /// Makes one in a pod of a lab.
    pub fn inside(scene: &Stage, pod: &str) -> Self {
        let name = format!("{}guest", netns_prefix(&scene.lab.name()));
        Netns::create_named(&name).unwrap();
        let netns = Netns::open(Netns::path_of(&name)).unwrap();
        let in_pod = scene.lab.netns(pod).unwrap();
        script(&in_pod, &IN_POD.replace("GUEST", &name));
        script(&netns, INSIDE);
        Self {
            netns,
            addresses: ["172.31.7.2", "fd31:7::2"].map(|address| address.parse().unwrap()),
            ports: AtomicU16::new(61_000),
        }
    }

    /// Makes a check from it, in this thread.
    pub fn attempt(&self, to: SocketAddr, check: Check, limit: Duration) -> Outcome {
        let options = ClientOptions {
            to,
            timeout_ms: u64::try_from(limit.as_millis()).unwrap(),
            from_port: Some(self.ports.fetch_add(1, Ordering::Relaxed)),
            check,
        };
        let checked = self.netns.run(|| traffic::check(&options));
        checked.unwrap().unwrap()
    }
}

fn script(netns: &Netns, text: &str) {
    let mut shell = std::process::Command::new("sh");
    shell.args(["-ec", text]);
    let output = netns.run(|| shell.output()).unwrap().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}: {stderr}");
}
