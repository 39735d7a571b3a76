//! Detaching and shutting down.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shared_proxy::core::AttachError;
use shared_proxy::drain::Drain;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::mesh::{CLIENT, Mesh, Pair};

const LIMIT: Duration = Duration::from_secs(30);

async fn established(mesh: &Mesh, door: SocketAddr, app: &TcpListener) -> (TcpStream, TcpStream) {
    let mut client = mesh.connect(CLIENT, door).await.unwrap();
    client.write_all(b"?").await.unwrap();
    let (mut server, _) = timeout(LIMIT, app.accept()).await.unwrap().unwrap();
    assert_eq!(server.read_u8().await.unwrap(), b'?');
    (client, server)
}

async fn works(client: &mut TcpStream, server: &mut TcpStream) {
    client.write_all(b"a").await.unwrap();
    assert_eq!(
        timeout(LIMIT, server.read_u8()).await.unwrap().unwrap(),
        b'a'
    );
    server.write_all(b"b").await.unwrap();
    assert_eq!(
        timeout(LIMIT, client.read_u8()).await.unwrap().unwrap(),
        b'b'
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_live_on_until_the_deadline_and_are_reset_then() {
    let pair = Pair::new().await;
    let app = pair.mesh.listen().await;
    let (mut client, mut server) = established(&pair.mesh, pair.door, &app).await;
    let started = Instant::now();
    let drain = Drain::within(Duration::from_millis(600));
    let detached = tokio::spawn(pair.server.detach(drain));
    tokio::time::sleep(Duration::from_millis(200)).await;
    works(&mut client, &mut server).await;

    // GOAWAY has arrived, the listener is closed: nobody gets in any more.
    let refused = match pair.mesh.connect(CLIENT, pair.door).await {
        Ok(mut late) => timeout(LIMIT, late.read(&mut [0; 1])).await.unwrap(),
        Err(error) => Err(error),
    };
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionReset);
    works(&mut client, &mut server).await;

    detached.await.unwrap();
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(600), "{took:?}");
    let cut = timeout(LIMIT, client.read(&mut [0; 1])).await.unwrap();
    assert_eq!(cut.unwrap_err().kind(), ErrorKind::ConnectionReset);
    let cut = timeout(LIMIT, server.read(&mut [0; 1])).await.unwrap();
    assert_eq!(cut.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_is_over_when_the_last_connection_is() {
    let pair = Pair::new().await;
    let app = pair.mesh.listen().await;
    let (client, server) = established(&pair.mesh, pair.door, &app).await;
    let started = Instant::now();
    let drain = Drain::within(Duration::from_secs(120));
    let detached = tokio::spawn(pair.server.detach(drain));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!detached.is_finished());
    drop((client, server));
    timeout(LIMIT, detached).await.unwrap().unwrap();
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tunnel_that_goes_away_is_replaced() {
    let pair = Pair::new().await;
    let app = pair.mesh.listen().await;
    let (mut client, mut server) = established(&pair.mesh, pair.door, &app).await;
    let drain = Drain::within(Duration::from_secs(60));
    let detaching = tokio::spawn(pair.server.detach(drain));
    // As after a restart of the capture: the address listens again, while the old connections drain.
    let again = loop {
        let free = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pair.mesh.server()));
        match free {
            Ok(scope) => break pair.two.core.attach(Arc::new(scope)).await.unwrap(),
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    let (mut other, mut other_server) = established(&pair.mesh, pair.door, &app).await;
    works(&mut other, &mut other_server).await;
    works(&mut client, &mut server).await;
    drop((client, server));
    timeout(LIMIT, detaching).await.unwrap().unwrap();
    works(&mut other, &mut other_server).await;
    drop(again);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_clients_side_drains_too() {
    let pair = Pair::new().await;
    let app = pair.mesh.listen().await;
    let (mut client, mut server) = established(&pair.mesh, pair.door, &app).await;
    let drain = Drain::within(Duration::from_millis(500));
    let detached = tokio::spawn(pair.clients.detach(drain));
    tokio::time::sleep(Duration::from_millis(150)).await;
    let refused = pair.mesh.connect(CLIENT, pair.door).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    works(&mut client, &mut server).await;
    detached.await.unwrap();
    let cut = timeout(LIMIT, server.read(&mut [0; 1])).await.unwrap();
    assert_eq!(cut.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_drains_all_and_takes_nothing_more() {
    let pair = Pair::new().await;
    let app = pair.mesh.listen().await;
    let (mut client, mut server) = established(&pair.mesh, pair.door, &app).await;
    let core = pair.two.core.clone();
    let down = tokio::spawn(async move { core.shutdown(Duration::from_millis(500)).await });
    tokio::time::sleep(Duration::from_millis(150)).await;
    works(&mut client, &mut server).await;
    let again = pair.two.core.attach(Arc::new(pair.mesh.clients())).await;
    assert!(matches!(again, Err(AttachError::ShuttingDown(_))));
    timeout(LIMIT, down).await.unwrap().unwrap();
    let cut = timeout(LIMIT, client.read(&mut [0; 1])).await.unwrap();
    assert_eq!(cut.unwrap_err().kind(), ErrorKind::ConnectionReset);
}
