//! Serving one client: its request, the connection that it asks for, and then that connection.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rand::seq::IndexedRandom;
use tokio::time::timeout;

use super::{Error, Reply, Target, read_request, write_reply};
use crate::capture::{Captured, ClientAddr, LocalWorkload, OrigDstAddr, Refusal, Role};
use crate::core::{Attachment, Failure};
use crate::dns::DnsConfig;
use crate::dns::lookup::{AddressFamily, Client, find};
use crate::drain::Signal;
use crate::outbound;
use crate::relay::Leg;
use crate::telemetry::{Direction, ResponseFlag};

/// How long a client may take for its request, and for taking the answer.
const WITHIN: Duration = Duration::from_secs(10);

/// Serves one client to the end of its connection.
pub(crate) async fn serve(attachment: Attachment, captured: Captured, signal: Signal) {
    let mut leg = Leg::new(captured.stream);
    let asked = tokio::select! {
        asked = Box::pin(ask(&attachment, captured.client, &mut leg)) => asked,
        () = signal.cut() => return,
    };
    let (client, dst) = match asked {
        Ok(asked) => asked,
        Err(failure) => {
            let reply = match &failure {
                Failure::Socks5(error) => error.reply(),
                failure => Some(reply_to(failure.flag())),
            };
            let mode = attachment.scope.id().capture_mode;
            let telemetry = &attachment.core.telemetry;
            let reason = failure.into();
            telemetry.refused(Direction::Outbound, mode, captured.client, None, &reason);
            if let Some(reply) = reply {
                refuse(leg, reply).await;
            }
            return;
        }
    };
    match outbound::open(&attachment, client, Ok(dst), &signal).await {
        Ok(ready) => {
            let (_, mut writer) = leg.split();
            // A client that does not take its answer is found out by the relay.
            let _ = timeout(WITHIN, write_reply(&mut writer, Reply::Succeeded)).await;
            ready.relay(leg, &signal).await;
        }
        Err(flag) => refuse(leg, reply_to(flag)).await,
    }
}

/// What a client hears of a connection that could not be made.
fn reply_to(flag: ResponseFlag) -> Reply {
    match flag {
        ResponseFlag::Denied => Reply::NotAllowed,
        ResponseFlag::Connect | ResponseFlag::NetworkPolicy => Reply::Unreachable,
        _ => Reply::Failed,
    }
}

/// Ends the connection in order, so that the answer is not lost.
async fn refuse(mut leg: Leg, reply: Reply) {
    let (_, mut writer) = leg.split();
    if let Ok(Ok(())) = timeout(WITHIN, write_reply(&mut writer, reply)).await {
        leg.finish();
    }
}

/// What the client wants, as a connection that its pod opens: from the pod's address, to one that the name stands for.
async fn ask(
    attachment: &Attachment,
    client: ClientAddr,
    leg: &mut Leg,
) -> Result<(ClientAddr, OrigDstAddr), Failure> {
    let (mut reader, mut writer) = leg.split();
    let target = timeout(WITHIN, read_request(&mut reader, &mut writer))
        .await
        .map_err(|_| Error::TimedOut)??;
    // Where it was meant for is not known before its request; whose it is, the listener says.
    let nowhere = OrigDstAddr((Ipv4Addr::UNSPECIFIED, 0).into());
    let pod = attachment.scope.owner(Role::Socks5, client, nowhere)?;
    let dst = match target {
        Target::Address(address) => address,
        Target::Hostname(name, port) => {
            SocketAddr::new(look_up(attachment, &pod, &name).await?, port)
        }
    };
    let ip = address_of(attachment, &pod, dst).await?;
    let client = ClientAddr(SocketAddr::new(ip, client.0.port()));
    Ok((client, OrigDstAddr(dst)))
}

/// The address that the pod speaks to `dst` with. A client that asks at the loopback address does not tell.
async fn address_of(
    attachment: &Attachment,
    pod: &LocalWorkload,
    dst: SocketAddr,
) -> Result<IpAddr, Failure> {
    let mut addresses = pod.addresses.iter();
    let of_family = addresses.find(|address| address.is_ipv4() == dst.is_ipv4());
    if let Some(address) = of_family.or_else(|| pod.addresses.first()) {
        return Ok(*address);
    }
    // Agents without our extension do not tell a pod's addresses; the kernel knows which one it would take.
    let chosen = async {
        let socket = attachment.scope.datagram(dst)?;
        socket.connect(dst).await?;
        socket.local_addr()
    };
    let chosen: io::Result<SocketAddr> = chosen.await;
    match chosen {
        Ok(address) => Ok(address.ip().to_canonical()),
        Err(error) => {
            tracing::debug!(%dst, %error, "the pod has no address towards a destination");
            Err(Refusal::UnknownOwner(dst.ip()).into())
        }
    }
}

/// An address of a name, as the pod would find it: the mesh's, else what the proxy's own resolver says.
async fn look_up(
    attachment: &Attachment,
    pod: &LocalWorkload,
    name: &str,
) -> Result<IpAddr, Failure> {
    let config = &attachment.core.config;
    let names = config.socks5.as_deref();
    let families = families(pod);
    if let Some(known) = names.and_then(|names| of_the_mesh(attachment, names, pod, name)) {
        let addresses = families.iter().map(|family| &known[usize::from(*family)]);
        let mut some = addresses.filter(|addresses| !addresses.is_empty());
        let chosen = some.next().and_then(|some| some.choose(&mut rand::rng()));
        return chosen.copied().ok_or_else(|| unresolved(name, NONE));
    }
    let found = timeout(config.connect_timeout, config.resolver.resolve(name))
        .await
        .map_err(|_| unresolved(name, "no answer in time"))?
        .map_err(|error| unresolved(name, &error.to_string()))?;
    let of = |ipv6: &bool| found.iter().find(|address| address.is_ipv6() == *ipv6);
    let chosen = families.iter().find_map(of);
    chosen.copied().ok_or_else(|| unresolved(name, NONE))
}

const NONE: &str = "it has none of a family that the pod has";

fn unresolved(name: &str, reason: &str) -> Failure {
    Failure::Unresolved {
        hostname: Arc::from(name),
        reason: reason.to_owned(),
    }
}

/// The families that a pod can speak, IPv6 as true, its preferred one first: both where its addresses are not known.
fn families(pod: &LocalWorkload) -> Vec<bool> {
    let mut families: Vec<bool> = pod.addresses.iter().map(IpAddr::is_ipv6).collect();
    if families.is_empty() {
        return vec![false, true];
    }
    let first = families[0];
    families.sort_by_key(|family| *family != first);
    families.dedup();
    families
}

/// The IPv4 and the IPv6 addresses of a name that the mesh knows.
fn of_the_mesh(
    attachment: &Attachment,
    names: &DnsConfig,
    pod: &LocalWorkload,
    name: &str,
) -> Option<[Vec<IpAddr>; 2]> {
    let client = Client {
        namespace: &pod.namespace,
        network: &attachment.core.config.network,
    };
    let snapshot = attachment.core.store.load();
    let known = find(&snapshot, names, client, name)?;
    let of = |family| known.addresses(&snapshot, names, client, family);
    Some([AddressFamily::V4, AddressFamily::V6].map(of))
}
