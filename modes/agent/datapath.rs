//! What the node capture asks of the node's network before it changes anything there: pods behind devices of their own, and
//! a UDP port for its tunnels.

use std::fs;
use std::net::IpAddr;

use host_net::netlink::{LinkInfo, Netlink};
use host_net::netns::Netns;
use host_net::plan::OverlayKind;
use inpod_redirect::extent::BYPASS_INBOUND;
use node_redirect::facts::{TUNNEL_IN, TUNNEL_OUT};

/// Why the node capture cannot be on this node.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unfit {
    /// A bridge.
    #[error(
        "{who} {ip} is behind the bridge {bridge}: packets from port to port of a bridge are not routed, so node capture \
         would not hold them. Use a network plugin with a route for each pod (ptp, Calico, kindnet), or --mode inpod"
    )]
    Bridge {
        /// A pod, or the proxy.
        who: &'static str,
        /// Its address.
        ip: IpAddr,
        /// Name of the bridge.
        bridge: String,
    },
    /// A pod whose inbound traffic is to be let alone.
    #[error(
        "{BYPASS_INBOUND}: the node capture leads all packets of a pod through its tunnels, in both directions or not at \
         all: capture this pod by --mode inpod, or without the annotation"
    )]
    OneDirection,
    /// A tunnel of somebody else.
    #[error(
        "UDP port {port} in {place} is taken by device {device} ({what}): choose another one for our tunnels, ambidex agent \
         --geneve-port PORT"
    )]
    TunnelOnPort {
        /// The port.
        port: u16,
        /// The node, or the proxy's namespace.
        place: &'static str,
        /// Name of the device.
        device: String,
        /// Why they cannot share it.
        what: &'static str,
    },
    /// A program.
    #[error(
        "UDP port {port} in {place} is taken by a program: choose another one for our tunnels, ambidex agent --geneve-port \
         PORT"
    )]
    ProgramOnPort {
        /// The port.
        port: u16,
        /// The node, or the proxy's namespace.
        place: &'static str,
    },
}

/// Refuses a bridge as the device that leads to a pod or proxy.
///
/// # Errors
/// Names it.
pub(super) fn refuse_bridge(who: &'static str, ip: IpAddr, device: &LinkInfo) -> Result<(), Unfit> {
    if device.kind.as_deref() == Some("bridge") {
        return Err(Unfit::Bridge {
            who,
            ip,
            bridge: device.name.clone(),
        });
    }
    Ok(())
}

/// Refuses a UDP port on which the kernel would not make our tunnels, or would mix them up with somebody else's.
///
/// # Errors
/// Names who has it.
pub(super) async fn refuse_taken_port(
    place: &'static str,
    netns: &Netns,
    port: u16,
    kind: OverlayKind,
) -> anyhow::Result<()> {
    let links = Netlink::connect(netns).await?.links().await?;
    let bound = netns.run(bound_udp_ports)?;
    taken(place, &links, &bound, port, kind)?;
    Ok(())
}

fn taken(
    place: &'static str,
    links: &[LinkInfo],
    bound: &[u16],
    port: u16,
    kind: OverlayKind,
) -> Result<(), Unfit> {
    let ours = [TUNNEL_IN, TUNNEL_OUT].map(|tunnel| [tunnel.host, tunnel.proxy]);
    let mut of_a_device = false;
    for link in links {
        let Some(overlay) = link.overlay.as_ref().filter(|overlay| overlay.port == port) else {
            continue;
        };
        of_a_device = true;
        if ours.as_flattened().contains(&link.name.as_str()) {
            continue;
        }
        let what = match overlay.external {
            true => "its packets carry the tunnel's parameters",
            false if overlay.kind != kind => "of another kind than our tunnels",
            // Devices of one kind share a port, if their networks differ; the kernel says so if they do not.
            false => continue,
        };
        return Err(Unfit::TunnelOnPort {
            port,
            place,
            device: link.name.clone(),
            what,
        });
    }
    // A tunnel device has its port's socket, too.
    if bound.contains(&port) && !of_a_device {
        return Err(Unfit::ProgramOnPort { port, place });
    }
    Ok(())
}

/// Bound UDP ports of this thread's namespace; the second column is `ADDRESS:PORT`, hexadecimal.
fn bound_udp_ports() -> Vec<u16> {
    let texts = ["udp", "udp6"].map(|name| {
        fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default()
    });
    let lines = texts.iter().flat_map(|text| text.lines().skip(1));
    let port = |line: &str| {
        let (_, port) = line.split_whitespace().nth(1)?.rsplit_once(':')?;
        u16::from_str_radix(port, 16).ok()
    };
    lines.filter_map(port).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    fn in_namespace(commands: &[&str]) -> Netns {
        let netns = Netns::create_unnamed().unwrap();
        for command in commands {
            let mut words = command.split(' ');
            let mut run = std::process::Command::new(words.next().unwrap());
            let done = netns.run(|| run.args(words).status()).unwrap().unwrap();
            assert!(done.success(), "{command}");
        }
        netns
    }

    async fn refusal(netns: &Netns) -> Option<String> {
        let port = refuse_taken_port("the node", netns, 6081, OverlayKind::Vxlan).await;
        port.err().map(|error| error.to_string())
    }

    #[tokio::test]
    async fn a_taken_port_is_named_with_its_owner() {
        let free =
            in_namespace(&["ip link add mine type vxlan id 7 remote 192.0.2.1 dstport 6081"]);
        assert_eq!(
            refusal(&free).await,
            None,
            "another network on the same port"
        );
        let own =
            in_namespace(&["ip link add istioin type vxlan id 1000 remote 192.0.2.1 dstport 6081"]);
        assert_eq!(refusal(&own).await, None, "our own");

        let collecting = in_namespace(&["ip link add ovn type vxlan external dstport 6081"]);
        let said = refusal(&collecting).await.unwrap();
        assert!(
            said.contains("device ovn") && said.contains("--geneve-port"),
            "{said}"
        );

        let program = in_namespace(&["ip link set lo up"]);
        let socket = program
            .run(|| std::net::UdpSocket::bind("127.0.0.1:6081"))
            .unwrap();
        let said = refusal(&program).await.unwrap();
        assert!(said.contains("by a program"), "{said}");
        drop(socket);
        assert_eq!(refusal(&program).await, None);
    }
}
