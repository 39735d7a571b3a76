//! The client's checks.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::connection::{Connection, Failure, Saw, receive_stream, send_stream};
use super::payload::Payload;
use super::request::{Ending, Request, Stream};
use super::{Check, ClientOptions, Findings, storm};

/// How often a watched connection's end is asked for before it counts as not seen.
const RECALLS: u32 = 50;
/// Time between two such questions.
const RECALL_EVERY: Duration = Duration::from_millis(100);
/// How a slow reader reads in the check of one-byte writes: enough to be done in seconds, little enough to stay behind.
const SLOW_READ_BYTES: usize = 512;
/// Rest of a slow reader between reads, in microseconds.
const SLOW_READ_EVERY_US: u64 = 1000;

/// Makes the check.
pub async fn perform(options: &ClientOptions) -> Result<Findings, Failure> {
    let to = options.to;
    match &options.check {
        Check::Who => who(options).await,
        Check::Marker { marker } => self::marker(options, marker.as_deref()).await,
        Check::Exchange { up, down } => exchange(to, *up, *down).await,
        Check::HalfClose { bytes } => {
            let client_first = exchange(to, *bytes, *bytes).await?;
            let server_first = watched(to, true, Stream::random(*bytes), Saw::Eof).await?;
            Ok(Findings {
                bytes: client_first.bytes + server_first.bytes,
                ..server_first
            })
        }
        Check::PeerReset { after } => peer_reset(to, *after).await,
        Check::OwnReset => watched(to, false, Stream::random(0), Saw::Reset).await,
        Check::OneByteWrites { count, pause_ms } => one_byte_writes(to, *count, *pause_ms).await,
        Check::Storm { connections } => storm::storm(to, *connections).await,
    }
}

async fn who(options: &ClientOptions) -> Result<Findings, Failure> {
    let mut connection =
        Connection::request_from(options.from_port, options.to, &Request::Who).await?;
    let local = local(&connection)?;
    let seen = connection.json().await?;
    connection.expect_end().await?;
    Ok(Findings {
        local: Some(local),
        seen: Some(seen),
        ..Findings::default()
    })
}

async fn marker(options: &ClientOptions, marker: Option<&str>) -> Result<Findings, Failure> {
    let marker = marker.map_or_else(
        || format!("marker-{:032x}", rand::random::<u128>()),
        str::to_owned,
    );
    let mut connection =
        Connection::request_from(options.from_port, options.to, &Request::Echo).await?;
    let line = format!("{marker}\n");
    connection
        .writer
        .write_all(line.as_bytes())
        .await
        .map_err(Failure::during("send the marker"))?;
    let back = connection.line().await?;
    if back != marker {
        return Err(Failure::new(
            Saw::WrongData,
            format!("sent {marker:?}, got {back:?}"),
        ));
    }
    connection.close_write().await?;
    connection.expect_end().await?;
    Ok(Findings {
        local: Some(local(&connection)?),
        marker: Some(marker),
        ..Findings::default()
    })
}

async fn exchange(to: SocketAddr, up: u64, down: u64) -> Result<Findings, Failure> {
    let (up, down) = (Stream::random(up), Stream::random(down));
    let mut connection = Connection::request(to, &Request::Exchange { up, down }).await?;
    let Connection { reader, writer } = &mut connection;
    let send = async {
        send_stream(writer, up).await?;
        writer
            .shutdown()
            .await
            .map_err(Failure::during("close the sending direction"))
    };
    tokio::try_join!(send, receive_stream(reader, down))?;
    let verdict: Ending = connection.json().await?;
    connection.expect_end().await?;
    require(&verdict, up.bytes, Saw::Eof)?;
    Ok(Findings {
        bytes: up.bytes + down.bytes,
        ..Findings::default()
    })
}

async fn peer_reset(to: SocketAddr, after: u64) -> Result<Findings, Failure> {
    let down = Stream::random(after);
    let mut connection = Connection::request(to, &Request::Reset { down }).await?;
    receive_stream(&mut connection.reader, down).await?;
    connection
        .writer
        .write_all(b"!")
        .await
        .map_err(Failure::during("ask for the reset"))?;
    let mut byte = [0];
    let saw = match connection.reader.read(&mut byte).await {
        Ok(0) => Saw::Eof,
        Ok(_) => Saw::WrongData,
        Err(error) => Saw::of(&error),
    };
    if saw != Saw::Reset {
        return Err(Failure::new(
            saw,
            format!("the server reset the connection, the client saw {saw:?}"),
        ));
    }
    Ok(Findings {
        bytes: after,
        saw: Some(saw),
        ..Findings::default()
    })
}

/// A connection whose end the server remembers: closed first by the server and then used by the client until it
/// closes too, or reset by the client. The memory is asked for on other connections.
async fn watched(
    to: SocketAddr,
    close_first: bool,
    up: Stream,
    wanted: Saw,
) -> Result<Findings, Failure> {
    let token = rand::random();
    let mut connection = Connection::request(
        to,
        &Request::Watch {
            token,
            close_first,
            up,
        },
    )
    .await?;
    let ready = connection.line().await?;
    if ready != "ready" {
        return Err(Failure::new(
            Saw::WrongData,
            format!("want ready, got {ready:?}"),
        ));
    }
    if close_first {
        connection.expect_end().await?;
    }
    send_stream(&mut connection.writer, up).await?;
    if wanted == Saw::Reset {
        connection.reset()?;
    } else {
        connection.close_write().await?;
        drop(connection);
    }
    for _ in 0..RECALLS {
        let mut question = Connection::request(to, &Request::Recall { token }).await?;
        if let Some(ending) = question.json::<Option<Ending>>().await? {
            require(&ending, up.bytes, wanted)?;
            return Ok(Findings {
                bytes: up.bytes,
                saw: Some(ending.saw),
                ..Findings::default()
            });
        }
        tokio::time::sleep(RECALL_EVERY).await;
    }
    Err(Failure::new(
        Saw::Timeout,
        "the server did not see the connection end (is it the only endpoint of this address?)",
    ))
}

async fn one_byte_writes(to: SocketAddr, count: u64, pause_ms: u64) -> Result<Findings, Failure> {
    let up = Stream::random(count);
    let request = Request::Slow {
        up,
        pause_ms,
        read_bytes: SLOW_READ_BYTES,
        every_us: SLOW_READ_EVERY_US,
    };
    let mut connection = Connection::request(to, &request).await?;
    let mut payload = Payload::new(up.seed);
    while payload.offset() < count {
        let offset = payload.offset();
        let sent = connection.writer.write_all(payload.take(1)).await;
        sent.map_err(Failure::during(format_args!(
            "send the byte at offset {offset}"
        )))?;
        // Lets a relay in between take each byte by itself instead of the whole socket buffer at once.
        tokio::task::yield_now().await;
    }
    connection.close_write().await?;
    let verdict: Ending = connection.json().await?;
    require(&verdict, count, Saw::Eof)?;
    Ok(Findings {
        bytes: count,
        ..Findings::default()
    })
}

/// Requires what a server says about the client's bytes.
fn require(ending: &Ending, bytes: u64, wanted: Saw) -> Result<(), Failure> {
    if ending.saw == wanted
        && ending.bytes == bytes
        && (ending.error.is_none() || wanted == Saw::Reset)
    {
        return Ok(());
    }
    let Ending {
        bytes: got,
        saw,
        error,
    } = ending;
    let detail = error.as_deref().unwrap_or("no error");
    Err(Failure::new(
        *saw,
        format!(
            "the server got {got} of {bytes} bytes and saw {saw:?}, want {wanted:?} ({detail})"
        ),
    ))
}

fn local(connection: &Connection) -> Result<SocketAddr, Failure> {
    connection
        .writer
        .local_addr()
        .map_err(Failure::during("own address"))
}
