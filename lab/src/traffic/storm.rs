//! Many connections that are all open at the same time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::Findings;
use super::connection::{Connection, Failure, Saw, receive_stream, send_stream};
use super::request::{Request, Stream};

/// Bytes that each connection echoes each time.
const ECHO_BYTES: u64 = 1024;

/// Opens all connections at once; each echoes, waits until all others did, echoes again and closes.
pub async fn storm(to: SocketAddr, connections: u32) -> Result<Findings, Failure> {
    let (all_open, _) = watch::channel(false);
    let all_open = Arc::new(all_open);
    let missing = Arc::new(AtomicU32::new(connections));
    let mut tasks = JoinSet::new();
    for _ in 0..connections {
        let (all_open, missing) = (Arc::clone(&all_open), Arc::clone(&missing));
        tasks.spawn(async move {
            let opened = open(to).await;
            // A failed connection counts too, else the others would wait for it until the timeout.
            if missing.fetch_sub(1, Ordering::AcqRel) == 1 {
                let _ = all_open.send_replace(true);
            }
            let mut connection = opened?;
            let mut others = all_open.subscribe();
            let _ = others.wait_for(|open| *open).await;
            echo(&mut connection).await?;
            connection.close_write().await?;
            connection.expect_end().await
        });
    }
    let mut first_failure = None;
    let mut failed = 0_u32;
    while let Some(done) = tasks.join_next().await {
        let result = done.unwrap_or_else(|error| Err(Failure::new(Saw::Other, error.to_string())));
        if let Err(failure) = result {
            failed += 1;
            first_failure.get_or_insert(failure);
        }
    }
    match first_failure {
        None => Ok(Findings {
            bytes: u64::from(connections) * ECHO_BYTES * 4,
            ..Findings::default()
        }),
        Some(first) => {
            let message =
                format!("{failed} of {connections} connections failed, the first: {first}");
            Err(Failure::new(first.saw, message))
        }
    }
}

async fn open(to: SocketAddr) -> Result<Connection, Failure> {
    let mut connection = Connection::request(to, &Request::Echo).await?;
    echo(&mut connection).await?;
    Ok(connection)
}

async fn echo(connection: &mut Connection) -> Result<(), Failure> {
    let stream = Stream::random(ECHO_BYTES);
    send_stream(&mut connection.writer, stream).await?;
    receive_stream(&mut connection.reader, stream).await
}
