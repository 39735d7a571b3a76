//! Where a pod's connections go.

use std::net::{IpAddr, SocketAddr};

use lab::topology::workloads::LocalXds;
use lab::topology::{APPLICATION_PORT, OUTSIDE, SERVICE_PORT, SERVICE_VIP};
use rstest::rstest;
use serde_json::json;

use crate::harness::Stage;
use crate::harness::Variant::{self, Inpod, NodeHybrid};
use crate::{CLIENT, SERVER, WAYPOINT, service, set, shared};

/// The service's other endpoint, on the client's node.
const OTHER: &str = "pod1-2";

/// What becomes of a connection of the client's.
enum Leads {
    /// To this workload, in a tunnel that asks for this.
    To(&'static str, Option<String>),
    /// Past the mesh, to whom it was meant for.
    Outside,
    /// Nowhere: it is reset, and this is why.
    Fails(&'static str),
}

/// How the mesh is made, and what follows for a connection to the lab's service.
struct Row {
    mesh: fn(&mut LocalXds),
    leads: fn(&Stage) -> Leads,
}

fn balancer(state: &mut LocalXds, scopes: &[&str], mode: &str, health: &str) {
    let balancer = json!({"routingPreferences": scopes, "mode": mode, "healthPolicy": health});
    state.services[0]
        .more
        .insert("loadBalancer".to_owned(), balancer);
}

/// What serves in another zone than the client.
fn zones(state: &mut LocalXds, far: &[&str]) {
    let names: Vec<String> = state.workloads.iter().map(|it| it.name.clone()).collect();
    for name in names {
        let zone = if far.contains(&name.as_str()) {
            "z2"
        } else {
            "z1"
        };
        set(
            state,
            &name,
            "locality",
            json!({"region": "r", "zone": zone}),
        );
    }
}

fn to_the_server(stage: &Stage) -> Leads {
    Leads::To(SERVER, Some(stage.at(SERVER).to_string()))
}

fn to_the_other(stage: &Stage) -> Leads {
    Leads::To(OTHER, Some(stage.at(OTHER).to_string()))
}

const NOBODY: Leads = Leads::Fails("~no healthy endpoint");

fn by_the_waypoint(_: &Stage) -> Leads {
    Leads::To(WAYPOINT, Some(format!("{SERVICE_VIP}:{SERVICE_PORT}")))
}

const ROW_1_WAYPOINT_BY_HOSTNAME: Row = Row {
    mesh: |state| {
        let waypoint = service(state, "wp", &[], Some(WAYPOINT));
        state.services.push(waypoint);
        let named = json!({"destination": "beta/wp.beta.svc.cluster.local"});
        state.services[0].more.insert("waypoint".to_owned(), named);
    },
    leads: by_the_waypoint,
};

const ROW_1_WAYPOINT_BY_ITS_SERVICE_S_ADDRESS: Row = Row {
    mesh: |state| {
        let waypoint = service(state, "wp", &["/10.98.0.2".to_owned()], Some(WAYPOINT));
        state.services.push(waypoint);
        let named = json!({"destination": "/10.98.0.2"});
        state.services[0].more.insert("waypoint".to_owned(), named);
    },
    leads: by_the_waypoint,
};

const ROW_1_WAYPOINT_OTHER: Row = Row {
    mesh: |state| {
        let named = json!({"destination": "/10.98.0.3"});
        state.services[0].more.insert("waypoint".to_owned(), named);
    },
    leads: |_| Leads::Fails("~waypoint"),
};

const ROW_3_CAPACITY_IS_WEIGHT: Row = Row {
    mesh: |state| set(state, OTHER, "capacity", json!(0)),
    leads: to_the_server,
};

const ROW_3_PREFERENCE_STRICT: Row = Row {
    mesh: |state| {
        zones(state, &[SERVER]);
        balancer(state, &["Region", "Zone"], "Strict", "OnlyHealthy");
    },
    leads: to_the_other,
};

const ROW_3_PREFERENCE_FAILOVER_TAKES_WHAT_IS_THERE: Row = Row {
    mesh: |state| {
        zones(state, &[SERVER, OTHER]);
        set(state, OTHER, "status", json!("Unhealthy"));
        balancer(state, &["Region", "Zone"], "Failover", "OnlyHealthy");
    },
    leads: to_the_server,
};

const ROW_3_SERVICE_SANS_ARE_ACCEPTED: Row = Row {
    mesh: |state| {
        let server = state.workload_mut(SERVER).unwrap().clone();
        let names = json!([format!(
            "spiffe://cluster.local/ns/{}/sa/{}",
            server.namespace, server.service_account
        )]);
        // Its own name is another one to those who do not know the service's.
        set(state, SERVER, "trustDomain", json!("elsewhere"));
        set(state, OTHER, "capacity", json!(0));
        state.services[0]
            .more
            .insert("subjectAltNames".to_owned(), names);
    },
    leads: to_the_server,
};

const ROW_4_STRICT_AND_NOBODY_NEAR: Row = Row {
    mesh: |state| {
        zones(state, &[SERVER, OTHER]);
        balancer(state, &["Region", "Zone"], "Strict", "OnlyHealthy");
    },
    leads: |_| NOBODY,
};

const ROW_4_NOBODY_SERVES_IT: Row = Row {
    mesh: |state| {
        for workload in &mut state.workloads {
            workload.services.clear();
        }
    },
    leads: |_| NOBODY,
};

const SOURCE_NOT_TOLD_OF: Row = Row {
    mesh: |state| state.workloads.retain(|it| it.name != CLIENT),
    leads: |_| Leads::Fails("~workload"),
};

/// The rows of outbound decisions that other tests do not have in a lab.
#[rstest]
#[case::row_1_waypoint_by_hostname(ROW_1_WAYPOINT_BY_HOSTNAME)]
#[case::row_1_waypoint_by_its_service_s_address(ROW_1_WAYPOINT_BY_ITS_SERVICE_S_ADDRESS)]
#[case::row_1_waypoint_unknown(ROW_1_WAYPOINT_OTHER)]
#[case::row_3_capacity_is_weight(ROW_3_CAPACITY_IS_WEIGHT)]
#[case::row_3_preference_strict(ROW_3_PREFERENCE_STRICT)]
#[case::row_3_preference_failover_takes_what_is_there(
    ROW_3_PREFERENCE_FAILOVER_TAKES_WHAT_IS_THERE
)]
#[case::row_3_service_sans_are_accepted(ROW_3_SERVICE_SANS_ARE_ACCEPTED)]
#[case::row_4_strict_and_nobody_near(ROW_4_STRICT_AND_NOBODY_NEAR)]
#[case::row_4_nobody_serves_it(ROW_4_NOBODY_SERVES_IT)]
#[case::source_not_told_of(SOURCE_NOT_TOLD_OF)]
fn connections_to_the_service(#[values(NodeHybrid, Inpod)] variant: Variant, #[case] row: Row) {
    let scene = shared(variant);
    let vip: SocketAddr = (SERVICE_VIP, SERVICE_PORT).into();
    scene.serve(WAYPOINT, SERVICE_PORT);
    let _alone = scene.in_state(|state| (row.mesh)(state));
    lead(&scene, vip, &(row.leads)(&scene));
}

/// Passed through: a service's address that somebody outside really has, who is no endpoint of it.
#[rstest]
#[case::row_3_mode_passthrough("Passthrough", Leads::Outside)]
#[case::row_4_any_other_mode("Standard", NOBODY)]
fn an_address_that_is_passed_through(
    #[values(NodeHybrid, Inpod)] variant: Variant,
    #[case] mode: &str,
    #[case] leads: Leads,
) {
    let scene = shared(variant);
    let _alone = scene.in_state(|state| {
        let mut outside = service(state, "outside", &[format!("/{OUTSIDE}")], None);
        outside.ports = [(APPLICATION_PORT, APPLICATION_PORT)].into();
        state.services.insert(0, outside);
        balancer(state, &[], mode, "OnlyHealthy");
    });
    lead(&scene, (OUTSIDE, APPLICATION_PORT).into(), &leads);
}

/// Calls six times, so that what leads elsewhere now and then is seen to.
fn lead(scene: &Stage, to: SocketAddr, leads: &Leads) {
    for _ in 0..6 {
        let near = scene.mark(1);
        let outbound = ("direction", "outbound");
        match leads {
            Leads::Fails(why) => {
                scene.refused(CLIENT, to);
                scene.access_line(near, &[outbound, ("error", why)]);
                // It fails for everybody, and may take its time.
                return;
            }
            Leads::Outside => {
                scene.seen(CLIENT, to);
                let line = scene.access_line(near, &[outbound, ("src.workload", CLIENT)]);
                assert!(line.get("dst.hbone_addr").is_none(), "{line:#}");
                assert_eq!(line["dst.addr"], to.to_string(), "{line:#}");
            }
            Leads::To(workload, asked) => {
                assert_eq!(scene.seen(CLIENT, to), IpAddr::from(scene.ip(CLIENT)));
                let line = scene.access_line(near, &[outbound, ("src.workload", CLIENT)]);
                assert_eq!(line["dst.workload"], *workload, "{line:#}");
                assert_eq!(
                    line["dst.hbone_addr"].as_str(),
                    asked.as_deref(),
                    "{line:#}"
                );
            }
        }
    }
}
