//! Revoked certificates where a tunnel is in a tunnel: each has a peer of its own.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{
    CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber,
};
use shared_proxy::capture::{HBONE_PORT, Role};
use shared_proxy::core::CoreConfig;
use shared_proxy::identity::{Revocations, TlsOptions, WorkloadCertificate};
use shared_proxy::pool::PoolConfig;
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::mesh::{CLIENT, Mesh, SERVER, assert_failed, assert_refused, quick};
use crate::peer::{Peer, certificate, identity};

const LIMIT: Duration = Duration::from_secs(30);
/// Last number of the gateway's address.
const GATEWAY: u8 = 31;

/// The pod behind the gateway is known here by its service and network, and there by its address.
const STATE: &str = "
workloads:
- {uid: client, name: client, namespace: default, serviceAccount: client, workloadIps: [NET.11], protocol: HBONE, services: {}}
- {uid: far, name: far, namespace: default, serviceAccount: server, network: there, networkGateway: {destination: there/NET.31},
   workloadIps: [], protocol: HBONE, services: {default/web: {80: 8080}}}
- {uid: there, name: there, namespace: default, serviceAccount: server, workloadIps: [NET.21], protocol: HBONE,
   services: {default/web: {80: 8080}}, capacity: 0}
- {uid: gateway, name: gateway, namespace: default, serviceAccount: between, workloadIps: [NET.31], network: there, services: {}}
services:
- {name: web, namespace: default, hostname: web, vips: [/10.96.0.1], ports: {80: 8080}}
";

/// A revocation list of the mesh's CA with a certificate on it.
fn list(mesh: &Mesh, certificate: &WorkloadCertificate) -> String {
    let key = KeyPair::from_pem(&mesh.ca_file("root-key.pem")).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&mesh.ca_file("root-cert.pem"), key).unwrap();
    let digits = certificate.serial_hex();
    let serial: Vec<u8> = (0..digits.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap())
        .collect();
    let now = OffsetDateTime::now_utc();
    let list = CertificateRevocationListParams {
        this_update: now,
        next_update: now + Duration::from_secs(3600),
        crl_number: SerialNumber::from(1_u64),
        issuing_distribution_point: None,
        revoked_certs: vec![RevokedCertParams {
            serial_number: SerialNumber::from_slice(&serial),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        }],
        key_identifier_method: KeyIdMethod::Sha256,
    };
    list.signed_by(&issuer).unwrap().pem().unwrap()
}

/// Whose certificate is revoked, and how many tunnels to the gateway are left: it is not to blame for who is behind it.
#[rstest::rstest]
#[case::of_the_gateway(true, 0)]
#[case::of_the_pod_behind_it(false, 1)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tunnel_in_a_tunnel_ends_with_either_peer(
    #[case] of_the_gateway: bool,
    #[case] left: usize,
) {
    let mesh = Mesh::empty();
    mesh.publish_text(STATE);
    let (two, certificates) = mesh.node_under(quick(), TlsOptions::default());
    let _server = two.core.attach(Arc::new(mesh.server())).await.unwrap();
    let app = mesh.listen().await;
    let between = certificate(&mesh, "between").await;
    let at = SocketAddr::new(mesh.ip(GATEWAY), HBONE_PORT);
    let mut gateway = Peer::of(&between, at).await;

    let revocations = Arc::new(Revocations::new());
    let options = TlsOptions {
        revocations: Some(Arc::clone(&revocations)),
        key_log: None,
    };
    // Tunnels that have ended are looked for four times in this time.
    let pool = PoolConfig {
        idle_release: Duration::from_secs(20),
        ..PoolConfig::default()
    };
    let config = CoreConfig { pool, ..quick() };
    let (one, _) = mesh.node_under(config, options);
    let scope = mesh.clients();
    let dst = "10.96.0.1:80".parse().unwrap();
    let door = scope.forward(mesh.ip(CLIENT), Role::Outbound, dst);
    let _clients = one.core.attach(Arc::new(scope)).await.unwrap();

    let connecting = mesh.connect(CLIENT, door);
    let mut client = connecting.await.unwrap();
    let behind = SocketAddr::new(mesh.ip(SERVER), HBONE_PORT);
    gateway.asked().await.forward(behind);
    let (mut application, _) = timeout(LIMIT, app.accept()).await.unwrap().unwrap();
    client.write_all(b"?").await.unwrap();
    let mut byte = [0];
    timeout(LIMIT, application.read_exact(&mut byte))
        .await
        .unwrap()
        .unwrap();

    let whose = if of_the_gateway {
        between
    } else {
        certificates.get(&identity("server")).await.unwrap()
    };
    revocations.replace(list(&mesh, &whose).as_bytes()).unwrap();
    let ended = timeout(LIMIT, client.read(&mut byte)).await.unwrap();
    assert_eq!(ended.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_failed(&one, "CERT_REVOKED").await;
    let pooled = timeout(LIMIT, async {
        while one.core.pooled_tunnels() != left {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    pooled.await.unwrap();

    // Nor does another one come about.
    let another = mesh.connect(CLIENT, door).await;
    if !of_the_gateway {
        gateway.asked().await.forward(behind);
    }
    assert_refused(another).await;
    let reached = timeout(Duration::from_millis(50), app.accept()).await;
    assert!(reached.is_err(), "the application was reached");
}
