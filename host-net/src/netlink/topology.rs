//! What a lab needs to build a network: veth pairs, bridges, addresses and plain routes.

use std::net::IpAddr;
use std::os::fd::AsRawFd;

use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute};
use netlink_packet_route::route::RouteProtocol;
use rtnetlink::{LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth};

use super::links::object;
use super::routes::{self, Shape};
use super::{Netlink, NetlinkError};
use crate::netns::Netns;

impl Netlink {
    /// Makes a veth pair: `name` here, `peer_name` in `peer_ns`. Both are down.
    ///
    /// # Errors
    /// EEXIST when either name is taken.
    pub async fn add_veth(
        &self,
        name: &str,
        peer_name: &str,
        peer_ns: &Netns,
    ) -> Result<(), NetlinkError> {
        let peer = LinkUnspec::new_with_name(peer_name)
            .setns_by_fd(peer_ns.as_fd().as_raw_fd())
            .build();
        let pair = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(name)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .build();
        self.create(RouteNetlinkMessage::NewLink(pair))
            .await
            .map_err(|e| NetlinkError::kernel(format!("veth pair {name} - {peer_name}"), e))
    }

    /// Makes a bridge, down.
    pub async fn add_bridge(&self, name: &str) -> Result<(), NetlinkError> {
        let message = LinkBridge::new(name).build();
        self.create(RouteNetlinkMessage::NewLink(message))
            .await
            .map_err(|e| NetlinkError::kernel(format!("bridge {name}"), e))
    }

    /// Brings a device up.
    pub async fn set_up(&self, name: &str) -> Result<(), NetlinkError> {
        self.change_link(name, LinkMessageBuilder::up).await
    }

    /// Brings a device down.
    pub async fn set_down(&self, name: &str) -> Result<(), NetlinkError> {
        self.change_link(name, LinkMessageBuilder::down).await
    }

    /// Sets the MTU of a device, in bytes.
    pub async fn set_mtu(&self, name: &str, mtu: u32) -> Result<(), NetlinkError> {
        self.change_link(name, |link| link.mtu(mtu)).await
    }

    /// Enslaves a device to a bridge.
    pub async fn set_master(&self, name: &str, master: &str) -> Result<(), NetlinkError> {
        let index = self.required_index(master, &object(name)).await?;
        self.change_link(name, |link| link.controller(index)).await
    }

    /// Moves a device to another namespace; it is down there and has no addresses.
    pub async fn move_to(&self, name: &str, ns: &Netns) -> Result<(), NetlinkError> {
        let fd = ns.as_fd().as_raw_fd();
        self.change_link(name, |link| {
            link.append_extra_attribute(LinkAttribute::NetNsFd(fd))
        })
        .await
    }

    /// Adds a route to the main table, as `ip route add DST [via VIA] dev DEV proto static` does.
    pub async fn add_plain_route(
        &self,
        dst: IpNet,
        via: Option<IpAddr>,
        dev: &str,
    ) -> Result<(), NetlinkError> {
        let object = format!("route {dst} dev {dev}");
        let index = self.required_index(dev, &object).await?;
        let message = Shape::plain(dst, via, index).message(RouteProtocol::Static);
        self.create(RouteNetlinkMessage::NewRoute(message))
            .await
            .map_err(|e| NetlinkError::kernel(object, e))
    }

    /// Deletes a route that [`Netlink::add_plain_route`] made; false when there is none.
    pub async fn del_plain_route(
        &self,
        dst: IpNet,
        via: Option<IpAddr>,
        dev: &str,
    ) -> Result<bool, NetlinkError> {
        let Some(index) = self.index_of(dev).await? else {
            return Ok(false);
        };
        let message = Shape::plain(dst, via, index).message(RouteProtocol::Static);
        let gone = self.change(RouteNetlinkMessage::DelRoute(message)).await;
        routes::deleted(gone).map_err(|e| NetlinkError::kernel(format!("route {dst} dev {dev}"), e))
    }

    pub(super) async fn required_index(
        &self,
        dev: &str,
        object: &str,
    ) -> Result<u32, NetlinkError> {
        self.index_of(dev)
            .await?
            .ok_or_else(|| NetlinkError::NoDevice {
                object: object.to_owned(),
                dev: dev.to_owned(),
            })
    }

    async fn change_link(
        &self,
        name: &str,
        change: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec>,
    ) -> Result<(), NetlinkError> {
        let object = object(name);
        let index = self.required_index(name, &object).await?;
        let message = change(LinkUnspec::new_with_index(index)).build();
        self.change(RouteNetlinkMessage::NewLink(message))
            .await
            .map_err(|e| NetlinkError::kernel(object, e))
    }
}
