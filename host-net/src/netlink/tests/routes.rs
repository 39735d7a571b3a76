//! Routes, one by one and many at once, and the one a packet takes.

use super::*;

#[tokio::test]
async fn a_route_with_another_next_hop_is_a_conflict() {
    let stage = Stage::new().await;
    let netlink = &stage.netlink;
    let mut wanted = route(100, "10.244.1.4/32", "eth0");
    wanted.via = Some("10.0.0.2".parse().unwrap());
    wanted.scope = RouteScope::Global;
    wanted.src = Some("10.0.0.1".parse().unwrap());
    assert_eq!(netlink.add_route(&wanted).await.unwrap(), Made::Created);
    assert_eq!(netlink.add_route(&wanted).await.unwrap(), Made::Existed);

    let mut others = vec![wanted.clone(); 3];
    others[0].via = Some("10.0.0.9".parse().unwrap());
    others[1].src = None;
    others[2].onlink = true;
    for other in &others {
        let error = netlink.add_route(other).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "route 10.244.1.4/32 in table 100: something else is in its place: \
             10.244.1.4/32 via 10.0.0.2 dev eth0 table 100 proto 133 src 10.0.0.1"
        );
        assert!(!netlink.del_route(other).await.unwrap());
    }
    assert!(netlink.has_route(&wanted).await.unwrap());
    assert!(netlink.del_route(&wanted).await.unwrap());
    assert!(!netlink.del_route(&wanted).await.unwrap());

    let unreachable = Route {
        via: Some("172.16.0.1".parse().unwrap()),
        ..wanted.clone()
    };
    let error = netlink.add_route(&unreachable).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "route 10.244.1.4/32 in table 100: Network is unreachable (os error 101)"
    );
    let nowhere = Route {
        dev: "nosuch".into(),
        ..wanted.clone()
    };
    let error = netlink.add_route(&nowhere).await.unwrap_err();
    assert!(matches!(error, NetlinkError::NoDevice { .. }), "{error}");
    assert!(!netlink.del_route(&nowhere).await.unwrap());

    stage.ip("route add 10.244.1.4/32 via 10.0.0.2 dev eth0 src 10.0.0.1 table 100");
    assert_eq!(netlink.add_route(&wanted).await.unwrap(), Made::Existed);
    assert!(
        !netlink.del_route(&wanted).await.unwrap(),
        "not made by this program"
    );
}

#[tokio::test]
async fn many_routes_go_in_one_batch_and_each_answers_for_itself() {
    let stage = Stage::new().await;
    let mut routes: Vec<_> = (0..=255)
        .map(|n| route(1000, &format!("10.9.{n}.0/24"), "eth0"))
        .collect();
    routes[7].dst = "10.0.7.1/24".parse().unwrap();
    stage
        .netlink
        .add_route(&route(1000, "10.9.3.0/24", "eth0"))
        .await
        .unwrap();
    stage.ip("route add blackhole 10.9.5.0/24 table 1000");
    let results = stage.netlink.add_routes(&routes).await;
    for (n, result) in results.iter().enumerate() {
        match n {
            3 => assert_eq!(*result.as_ref().unwrap(), Made::Existed),
            5 => assert!(matches!(result, Err(NetlinkError::Conflict { .. }))),
            7 => assert!(matches!(result, Err(NetlinkError::Kernel { .. }))),
            _ => assert_eq!(*result.as_ref().unwrap(), Made::Created, "{n}"),
        }
    }
    assert_eq!(stage.ip("route show table 1000").lines().count(), 255);
    let removed = stage.netlink.del_routes(&routes).await;
    let gone = removed.iter().filter(|r| matches!(r, Ok(true))).count();
    assert_eq!(gone, 254);
    assert_eq!(stage.ip("route show table 1000"), "blackhole 10.9.5.0/24");
}

#[tokio::test]
async fn ipv6_destinations_are_accepted() {
    let stage = Stage::new().await;
    let mut local = route(100, "::/0", "lo");
    local.kind = RouteKind::Local;
    local.scope = RouteScope::Host;
    assert_eq!(
        stage.netlink.add_route(&local).await.unwrap(),
        Made::Created
    );
    assert_eq!(
        stage.netlink.add_route(&local).await.unwrap(),
        Made::Existed
    );
    assert!(
        stage
            .ip("-6 route show table 100")
            .starts_with("local default dev lo proto 133")
    );
    assert!(stage.netlink.del_route(&local).await.unwrap());
    assert_eq!(stage.ip("-6 route show table 100"), "");
}

#[tokio::test]
async fn the_route_to_an_address_names_its_device() {
    let stage = Stage::new().await;
    let netlink = &stage.netlink;
    let to = |ip: &str| ip.parse::<IpAddr>().unwrap();
    let direct = netlink.route_to(to("10.0.0.2")).await.unwrap();
    assert_eq!(
        (direct.dev.as_str(), direct.via, direct.table),
        ("eth0", None, 254)
    );
    assert_eq!(direct.src, Some(to("10.0.0.1")));
    let error = netlink.route_to(to("10.244.1.4")).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "route to 10.244.1.4: Network is unreachable (os error 101)"
    );

    let default = "0.0.0.0/0".parse().unwrap();
    netlink
        .add_plain_route(default, Some(to("10.0.0.2")), "eth0")
        .await
        .unwrap();
    let far = netlink.route_to(to("10.244.1.4")).await.unwrap();
    assert_eq!(far.via, Some(to("10.0.0.2")));
    netlink
        .add_rule(&rule(50, None, RuleAction::Lookup(1000)))
        .await
        .unwrap();
    netlink
        .add_route(&route(1000, "10.244.1.4/32", "eth0"))
        .await
        .unwrap();
    let own_table = netlink.route_to(to("10.244.1.4")).await.unwrap();
    assert_eq!((own_table.via, own_table.table), (None, 1000));
    let own = netlink.route_to(to("10.0.0.1")).await.unwrap();
    assert_eq!((own.dev.as_str(), own.table), ("lo", 255));
    let gone = netlink.del_plain_route(default, Some(to("10.0.0.2")), "eth0");
    assert!(gone.await.unwrap());

    netlink
        .add_ip("eth0", "fd00::1/64".parse().unwrap())
        .await
        .unwrap();
    let v6 = netlink.route_to(to("fd00::2")).await.unwrap();
    assert_eq!((v6.dev.as_str(), v6.via), ("eth0", None));
}
