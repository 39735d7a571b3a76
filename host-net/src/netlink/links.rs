//! Devices: overlay devices of a plan, and what is known of any device.

use std::fmt;
use std::io;
use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoGeneve, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo as Info, LinkMessage,
};
use nix::libc::{EEXIST, ENODEV, EOPNOTSUPP};
use rtnetlink::{LinkGeneve, LinkUnspec, LinkVxlan};

use super::{Made, Netlink, NetlinkError, Presence};
use crate::netns::Netns;
use crate::plan::{Link, OverlayKind};

/// A device as the kernel reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkInfo {
    /// Interface index, unique in the namespace.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Driver: `veth`, `bridge`, `vxlan`, …; none for physical devices and `lo`.
    pub kind: Option<String>,
    /// Tunnel parameters of a geneve or vxlan device.
    pub overlay: Option<Overlay>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Index of the bridge (or other master) it is enslaved to.
    pub master: Option<u32>,
    /// Index of the peer (veth) or lower device, in the namespace that `peer_netnsid` tells.
    pub peer: Option<u32>,
    /// This namespace's number for the namespace of the peer; none when it is the same one.
    pub peer_netnsid: Option<i32>,
}

/// Tunnel parameters of a geneve or vxlan device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    /// geneve or vxlan.
    pub kind: OverlayKind,
    /// Virtual network identifier.
    pub vni: u32,
    /// The other end; none for a device that learns or is steered from outside.
    pub remote: Option<IpAddr>,
    /// Own end, when fixed.
    pub local: Option<IpAddr>,
    /// UDP destination port.
    pub port: u16,
    /// Underlay device (index), when fixed.
    pub underlay: Option<u32>,
    /// Whether packets carry the tunnel parameters (`external`).
    pub external: bool,
    /// Time to live of the outer header; 0 means the system's default.
    pub ttl: u8,
}

impl Overlay {
    fn new(kind: OverlayKind) -> Self {
        Self {
            kind,
            vni: 0,
            remote: None,
            local: None,
            port: 0,
            underlay: None,
            external: false,
            ttl: 0,
        }
    }

    fn of_plan(link: &Link) -> Self {
        Self {
            vni: link.vni,
            remote: Some(link.remote.into()),
            port: link.port,
            ..Self::new(link.overlay)
        }
    }

    fn of_geneve(data: &[InfoGeneve]) -> Self {
        let mut overlay = Self::new(OverlayKind::Geneve);
        for item in data {
            match *item {
                InfoGeneve::Id(vni) => overlay.vni = vni,
                InfoGeneve::Remote(ip) => overlay.remote = Some(ip.into()),
                InfoGeneve::Remote6(ip) => overlay.remote = Some(ip.into()),
                InfoGeneve::Local(ip) => overlay.local = Some(ip.into()),
                InfoGeneve::Local6(ip) => overlay.local = Some(ip.into()),
                InfoGeneve::Port(port) => overlay.port = port,
                InfoGeneve::CollectMetadata => overlay.external = true,
                InfoGeneve::Ttl(ttl) => overlay.ttl = ttl,
                _ => {}
            }
        }
        overlay
    }

    fn of_vxlan(data: &[InfoVxlan]) -> Self {
        let mut overlay = Self::new(OverlayKind::Vxlan);
        for item in data {
            match *item {
                InfoVxlan::Id(vni) => overlay.vni = vni,
                InfoVxlan::Group(ip) => overlay.remote = Some(ip.into()),
                InfoVxlan::Group6(ip) => overlay.remote = Some(ip.into()),
                InfoVxlan::Local(ip) => overlay.local = Some(ip.into()),
                InfoVxlan::Local6(ip) => overlay.local = Some(ip.into()),
                InfoVxlan::Port(port) => overlay.port = port,
                InfoVxlan::Link(index) => overlay.underlay = Some(index),
                InfoVxlan::CollectMetadata(on) => overlay.external = on,
                InfoVxlan::Ttl(ttl) => overlay.ttl = ttl,
                _ => {}
            }
        }
        overlay
    }
}

impl fmt::Display for Overlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} id {}", self.kind, self.vni)?;
        if let Some(remote) = self.remote {
            write!(f, " remote {remote}")?;
        }
        if let Some(local) = self.local {
            write!(f, " local {local}")?;
        }
        if self.underlay.is_some() {
            f.write_str(" bound to a device")?;
        }
        write!(f, " dstport {}", self.port)?;
        if self.external {
            f.write_str(" external")?;
        }
        if self.ttl != 0 {
            write!(f, " ttl {}", self.ttl)?;
        }
        Ok(())
    }
}

impl fmt::Display for LinkInfo {
    /// Without indices, which differ from one creation to the next.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name)?;
        match (&self.overlay, &self.kind) {
            (Some(overlay), _) => write!(f, " {overlay}")?,
            (None, Some(kind)) => write!(f, " {kind}")?,
            (None, None) => {}
        }
        let state = if self.up { "up" } else { "down" };
        write!(f, " mtu {} {state}", self.mtu)
    }
}

impl LinkInfo {
    fn parse(message: &LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            kind: None,
            overlay: None,
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
            master: None,
            peer: None,
            peer_netnsid: None,
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Controller(index) => link.master = Some(*index),
                LinkAttribute::Link(index) => link.peer = Some(*index),
                LinkAttribute::LinkNetNsId(id) => link.peer_netnsid = Some(*id),
                LinkAttribute::LinkInfo(infos) => link.read_driver(infos),
                _ => {}
            }
        }
        link
    }

    fn read_driver(&mut self, infos: &[Info]) {
        for info in infos {
            match info {
                Info::Kind(kind) => self.kind = Some(kind.to_string()),
                Info::Data(InfoData::Geneve(data)) => self.overlay = Some(Overlay::of_geneve(data)),
                Info::Data(InfoData::Vxlan(data)) => self.overlay = Some(Overlay::of_vxlan(data)),
                _ => {}
            }
        }
    }

    fn compare(&self, wanted: &Link) -> Presence {
        let same = self.overlay.as_ref() == Some(&Overlay::of_plan(wanted))
            && self.mtu == wanted.mtu
            && self.up;
        if same {
            Presence::Same
        } else {
            Presence::Different {
                found: self.to_string(),
            }
        }
    }
}

pub(super) fn creation(link: &Link) -> LinkMessage {
    let (name, vni) = (link.name.as_str(), link.vni);
    match link.overlay {
        OverlayKind::Geneve => LinkGeneve::new(name, vni)
            .remote(link.remote)
            .port(link.port)
            .mtu(link.mtu)
            .up()
            .build(),
        OverlayKind::Vxlan => LinkVxlan::new(name, vni)
            .remote(link.remote)
            .port(link.port)
            .mtu(link.mtu)
            .up()
            .build(),
    }
}

impl Netlink {
    /// Makes an overlay device with its MTU and brings it up, in one request: it exists completely or not at all.
    ///
    /// # Errors
    /// [`NetlinkError::NoOverlay`] when the kernel lacks the driver; [`NetlinkError::Conflict`] when a device of that
    /// name has other parameters, or another device has the same VNI and port.
    pub async fn add_link(&self, wanted: &Link) -> Result<Made, NetlinkError> {
        let object = object(&wanted.name);
        let message = RouteNetlinkMessage::NewLink(creation(wanted));
        let error = match self.create(message).await {
            Ok(()) => return Ok(Made::Created),
            Err(error) => error,
        };
        match error.raw_os_error() {
            Some(EOPNOTSUPP) => Err(NetlinkError::NoOverlay(wanted.overlay)),
            Some(EEXIST) => match self.check_link(wanted).await? {
                Presence::Same => Ok(Made::Existed),
                Presence::Different { found } => Err(NetlinkError::Conflict { object, found }),
                Presence::Absent => Err(NetlinkError::kernel(object, error)),
            },
            _ => Err(NetlinkError::kernel(object, error)),
        }
    }

    /// Compares what stands in the place of an overlay device: a device of its name, or else of its VNI and port
    /// (the kernel allows one of each per namespace).
    pub async fn check_link(&self, wanted: &Link) -> Result<Presence, NetlinkError> {
        if let Some(found) = self.link(&wanted.name).await? {
            return Ok(found.compare(wanted));
        }
        let twin = self.links().await?.into_iter().find(|link| {
            link.overlay.as_ref().is_some_and(|overlay| {
                let key = (overlay.kind, overlay.vni, overlay.port);
                key == (wanted.overlay, wanted.vni, wanted.port)
            })
        });
        Ok(match twin {
            Some(link) => Presence::Different {
                found: link.to_string(),
            },
            None => Presence::Absent,
        })
    }

    /// Whether exactly this overlay device exists and is up.
    pub async fn has_link(&self, wanted: &Link) -> Result<bool, NetlinkError> {
        Ok(self.check_link(wanted).await? == Presence::Same)
    }

    /// Deletes a device of any kind; false when there is none of that name.
    pub async fn del_link(&self, name: &str) -> Result<bool, NetlinkError> {
        let Some(index) = self.index_of(name).await? else {
            return Ok(false);
        };
        let message = LinkUnspec::new_with_index(index).build();
        match self.change(RouteNetlinkMessage::DelLink(message)).await {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(ENODEV) => Ok(false),
            Err(e) => Err(NetlinkError::kernel(object(name), e)),
        }
    }

    /// The device of that name.
    pub async fn link(&self, name: &str) -> Result<Option<LinkInfo>, NetlinkError> {
        let message = LinkUnspec::new_with_name(name).build();
        self.one_link(message)
            .await
            .map_err(|e| NetlinkError::kernel(object(name), e))
    }

    /// The device with that index.
    pub async fn link_by_index(&self, index: u32) -> Result<Option<LinkInfo>, NetlinkError> {
        let message = LinkUnspec::new_with_index(index).build();
        self.one_link(message)
            .await
            .map_err(|e| NetlinkError::kernel(format!("device with index {index}"), e))
    }

    /// All devices of the namespace.
    pub async fn links(&self) -> Result<Vec<LinkInfo>, NetlinkError> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let answer = self.list(request).await;
        let messages = answer.map_err(|e| NetlinkError::kernel("list of devices", e))?;
        Ok(parse(messages))
    }

    pub(super) async fn index_of(&self, name: &str) -> Result<Option<u32>, NetlinkError> {
        Ok(self.link(name).await?.map(|link| link.index))
    }

    async fn one_link(&self, which: LinkMessage) -> io::Result<Option<LinkInfo>> {
        match self.get(RouteNetlinkMessage::GetLink(which)).await {
            Ok(messages) => Ok(parse(messages).into_iter().next()),
            Err(e) if e.raw_os_error() == Some(ENODEV) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

fn parse(messages: Vec<RouteNetlinkMessage>) -> Vec<LinkInfo> {
    let links = messages.iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewLink(link) => Some(LinkInfo::parse(link)),
        _ => None,
    });
    links.collect()
}

pub(super) fn object(name: &str) -> String {
    format!("device {name}")
}

/// Whether the kernel has the driver of an overlay, found out by making such a device in a throw-away namespace (which
/// also loads the module, where modules can be loaded). The reason for a no goes to the log.
pub async fn overlay_supported(kind: OverlayKind) -> bool {
    let link = Link {
        name: "probe".into(),
        overlay: kind,
        vni: 1,
        remote: std::net::Ipv4Addr::new(192, 0, 2, 1),
        port: 6081,
        mtu: 1450,
    };
    let attempt = async {
        let nowhere = Netns::create_unnamed().map_err(|source| NetlinkError::Connect {
            netns: "a throw-away namespace".into(),
            source,
        })?;
        Netlink::connect(&nowhere).await?.add_link(&link).await
    };
    match attempt.await {
        Ok(_) => true,
        Err(error) => {
            tracing::debug!(overlay = %kind, %error, "overlay not available");
            false
        }
    }
}
