//! Addresses on devices.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{EADDRNOTAVAIL, EEXIST, ENODEV};

use super::{Made, Netlink, NetlinkError, Presence};
use crate::plan::Address;

/// An address as the kernel reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedAddress {
    /// Device name.
    pub dev: String,
    /// Address with prefix length.
    pub addr: IpNet,
    /// The other end of a point-to-point address, when it differs.
    pub peer: Option<IpAddr>,
    /// Scope number of rtnetlink: 0 global, 253 link, 254 host.
    pub scope: u8,
}

fn message(index: u32, addr: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = addr.prefix_len();
    let ip = addr.addr();
    message.header.family = match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    if ip.is_loopback() {
        message.header.scope = AddressScope::Host;
    }
    // No broadcast address: `ip address add` sets none either.
    message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
    if ip.is_ipv6() {
        // Usable at once, without a second of duplicate address detection.
        message.header.flags = AddressHeaderFlags::Nodad;
        message
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    message
}

fn parse(message: &AddressMessage, names: &BTreeMap<u32, String>) -> Option<ListedAddress> {
    let (mut local, mut address) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            _ => {}
        }
    }
    let own = local.or(address)?;
    let index = message.header.index;
    Some(ListedAddress {
        dev: names
            .get(&index)
            .cloned()
            .unwrap_or_else(|| format!("if{index}")),
        addr: IpNet::new(own, message.header.prefix_len).ok()?,
        peer: address.filter(|peer| *peer != own),
        scope: message.header.scope.into(),
    })
}

impl Netlink {
    /// Adds an address to a device.
    ///
    /// # Errors
    /// [`NetlinkError::Conflict`] when the device has the same address with another prefix length.
    pub async fn add_address(&self, wanted: &Address) -> Result<Made, NetlinkError> {
        let object = object(&wanted.dev, wanted.addr);
        match self.check_address(wanted).await? {
            Presence::Same => Ok(Made::Existed),
            Presence::Different { found } => Err(NetlinkError::Conflict { object, found }),
            Presence::Absent => self.add_ip(&wanted.dev, wanted.addr).await,
        }
    }

    /// Compares what stands in the place of an address: the same address on the same device.
    pub async fn check_address(&self, wanted: &Address) -> Result<Presence, NetlinkError> {
        let wanted_addr = wanted.addr;
        let mut presence = Presence::Absent;
        for found in self.listed_addresses().await? {
            if found.dev != wanted.dev || found.addr.addr() != wanted_addr.addr() {
                continue;
            }
            if found.addr == wanted_addr && found.peer.is_none() {
                return Ok(Presence::Same);
            }
            presence = Presence::Different {
                found: found.to_string(),
            };
        }
        Ok(presence)
    }

    /// Whether the device has exactly this address.
    pub async fn has_address(&self, wanted: &Address) -> Result<bool, NetlinkError> {
        Ok(self.check_address(wanted).await? == Presence::Same)
    }

    /// Removes an address; false when the device or the address is not there.
    pub async fn del_address(&self, wanted: &Address) -> Result<bool, NetlinkError> {
        // The kernel would also take a point-to-point address whose peer lies in the prefix.
        if !self.has_address(wanted).await? {
            return Ok(false);
        }
        self.del_ip(&wanted.dev, wanted.addr).await
    }

    /// Adds an address of either family to a device.
    pub async fn add_ip(&self, dev: &str, addr: IpNet) -> Result<Made, NetlinkError> {
        let object = object(dev, addr);
        let index = self.required_index(dev, &object).await?;
        let request = RouteNetlinkMessage::NewAddress(message(index, addr));
        match self.create(request).await {
            Ok(()) => Ok(Made::Created),
            Err(e) if e.raw_os_error() == Some(EEXIST) => Ok(Made::Existed),
            Err(e) => Err(NetlinkError::kernel(object, e)),
        }
    }

    /// Removes an address of either family; false when the device or the address is not there.
    pub async fn del_ip(&self, dev: &str, addr: IpNet) -> Result<bool, NetlinkError> {
        let Some(index) = self.index_of(dev).await? else {
            return Ok(false);
        };
        let request = RouteNetlinkMessage::DelAddress(message(index, addr));
        match self.change(request).await {
            Ok(()) => Ok(true),
            Err(e) if matches!(e.raw_os_error(), Some(EADDRNOTAVAIL | ENODEV)) => Ok(false),
            Err(e) => Err(NetlinkError::kernel(object(dev, addr), e)),
        }
    }

    /// All addresses with their devices.
    pub async fn addresses(&self) -> Result<Vec<(String, IpNet)>, NetlinkError> {
        let listed = self.listed_addresses().await?;
        Ok(listed.into_iter().map(|a| (a.dev, a.addr)).collect())
    }

    /// All addresses with everything that distinguishes them.
    pub async fn listed_addresses(&self) -> Result<Vec<ListedAddress>, NetlinkError> {
        let names = self.names().await?;
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let answer = self.list(request).await;
        let messages = answer.map_err(|e| NetlinkError::kernel("list of addresses", e))?;
        let listed = messages.iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewAddress(address) => parse(address, &names),
            _ => None,
        });
        Ok(listed.collect())
    }

    /// Whether any device has this address. Costs nothing for devices without addresses: their names are not asked for.
    pub async fn has_ip(&self, ip: IpAddr) -> Result<bool, NetlinkError> {
        let mut request = AddressMessage::default();
        request.header.family = match ip {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        let answer = self.list(RouteNetlinkMessage::GetAddress(request)).await;
        let messages = answer.map_err(|e| NetlinkError::kernel("list of addresses", e))?;
        let nameless = BTreeMap::new();
        Ok(messages.iter().any(|message| match message {
            RouteNetlinkMessage::NewAddress(address) => {
                parse(address, &nameless).is_some_and(|found| found.addr.addr() == ip)
            }
            _ => false,
        }))
    }

    /// Device names by index.
    pub(super) async fn names(&self) -> Result<BTreeMap<u32, String>, NetlinkError> {
        let links = self.links().await?;
        Ok(links
            .into_iter()
            .map(|link| (link.index, link.name))
            .collect())
    }
}

impl std::fmt::Display for ListedAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} dev {}", self.addr, self.dev)?;
        if let Some(peer) = self.peer {
            write!(f, " peer {peer}")?;
        }
        match self.scope {
            0 => Ok(()),
            253 => f.write_str(" scope link"),
            254 => f.write_str(" scope host"),
            other => write!(f, " scope {other}"),
        }
    }
}

fn object(dev: &str, addr: IpNet) -> String {
    format!("address {addr} on {dev}")
}
