//! Overlay devices.

use netlink_packet_core::Emitable;

use super::*;

#[tokio::test]
async fn an_overlay_device_is_made_compared_and_deleted() {
    let stage = Stage::new().await;
    let wanted = vxlan("istioin");
    assert_eq!(
        stage.netlink.check_link(&wanted).await.unwrap(),
        Presence::Absent
    );
    assert_eq!(
        stage.netlink.add_link(&wanted).await.unwrap(),
        Made::Created
    );
    let shown = stage.ip("-d link show istioin");
    for part in [
        "vxlan id 1000 remote 10.0.0.2",
        "dstport 6081",
        "mtu 1450",
        ",UP",
    ] {
        assert!(shown.contains(part), "{part} in {shown}");
    }
    assert_eq!(
        stage.netlink.add_link(&wanted).await.unwrap(),
        Made::Existed
    );

    let mut others = vec![wanted.clone(); 4];
    others[0].vni = 1001;
    others[1].remote = "10.0.0.3".parse().unwrap();
    others[2].port = 4789;
    others[3].mtu = 1400;
    for other in &others {
        let error = stage.netlink.add_link(other).await.unwrap_err().to_string();
        assert_eq!(
            error,
            "device istioin: something else is in its place: \
             istioin vxlan id 1000 remote 10.0.0.2 dstport 6081 mtu 1450 up"
        );
        assert!(!stage.netlink.has_link(other).await.unwrap());
    }
    stage.netlink.set_down("istioin").await.unwrap();
    assert!(!stage.netlink.has_link(&wanted).await.unwrap());

    let twin = stage.netlink.add_link(&vxlan("twin")).await.unwrap_err();
    assert!(
        matches!(&twin, NetlinkError::Conflict { found, .. } if found.starts_with("istioin ")),
        "{twin}"
    );

    assert!(stage.netlink.del_link("istioin").await.unwrap());
    assert!(!stage.netlink.del_link("istioin").await.unwrap());
    assert!(stage.netlink.link("istioin").await.unwrap().is_none());
}

#[tokio::test]
async fn a_device_of_another_kind_is_a_conflict() {
    let stage = Stage::new().await;
    let error = stage.netlink.add_link(&vxlan("eth0")).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "device eth0: something else is in its place: eth0 veth mtu 1500 up"
    );
}

#[tokio::test]
async fn a_kernel_without_geneve_is_told_in_one_sentence() {
    assert!(overlay_supported(OverlayKind::Vxlan).await);
    let geneve = Link {
        overlay: OverlayKind::Geneve,
        ..vxlan("istioin")
    };
    let stage = Stage::new().await;
    let made = stage.netlink.add_link(&geneve).await;
    if overlay_supported(OverlayKind::Geneve).await {
        assert_eq!(made.unwrap(), Made::Created);
        assert_eq!(
            stage.netlink.add_link(&geneve).await.unwrap(),
            Made::Existed
        );
    } else {
        assert_eq!(
            made.unwrap_err().to_string(),
            "this kernel has no geneve: load the module (modprobe geneve) or use --overlay vxlan"
        );
    }
}

#[test]
fn the_geneve_request_carries_vni_remote_and_port() {
    let geneve = Link {
        overlay: OverlayKind::Geneve,
        ..vxlan("istioin")
    };
    let message = links::creation(&geneve);
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    let contains = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
    assert!(contains(b"istioin\0"));
    assert!(contains(b"geneve"));
    // Length and type in host order; then the VNI in host order, address and port in network order.
    let attribute = |kind: u16, value: &[u8]| {
        let length = 4 + u16::try_from(value.len()).unwrap();
        [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat()
    };
    assert!(contains(&attribute(1, &1000_u32.to_ne_bytes())));
    assert!(contains(&attribute(2, &[10, 0, 0, 2])));
    assert!(contains(&attribute(5, &[0x17, 0xc1])));
}
