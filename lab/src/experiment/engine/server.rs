//! The serving side of a load: compares what it hears, and answers as much.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::super::now_us;
use super::super::pattern::Pattern;
use super::{Broken, Engine, HELLO, Hello, Plan, Record, Served};
use crate::traffic::Saw;

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 4096;

pub(super) fn listen(plan: &Plan) -> Result<TcpListener> {
    let listen = || -> io::Result<TcpListener> {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind(plan.listen)?;
        socket.listen(BACKLOG)
    };
    listen().with_context(|| format!("listen on {}", plan.listen))
}

pub(super) async fn serve(listener: TcpListener, engine: Rc<Engine>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::task::spawn_local(converse(stream, Rc::clone(&engine)));
            }
            // Out of descriptors, or a client that went away before it was accepted: the next may do.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn converse(mut stream: TcpStream, engine: Rc<Engine>) {
    let _ = stream.set_nodelay(true);
    let mut hello = [0; HELLO];
    // Whoever says nothing is no client of this load.
    if stream.read_exact(&mut hello).await.is_err() {
        return;
    }
    let Some(hello) = Hello::parse(&hello) else {
        return;
    };
    if let Err((saw, what)) = answer(&mut stream, hello, &engine).await {
        engine.note(&Record::Served(Served {
            id: hello.id,
            by: engine.plan.pod.clone(),
            broken: Broken {
                at_us: now_us(),
                saw,
                what,
            },
        }));
    }
}

/// Answers until the client ends the connection between two messages.
async fn answer(
    stream: &mut TcpStream,
    hello: Hello,
    engine: &Engine,
) -> Result<(), (Saw, String)> {
    let size = hello.message_bytes as usize;
    let (up, down) = (Pattern::up(hello.id), Pattern::down(hello.id));
    let mut buffer = vec![0; size];
    let mut position = 0;
    loop {
        let mut have = 0;
        while have < size {
            let read = stream.read(&mut buffer[have..]).await;
            match read.map_err(|error| failed("receive", position, &error))? {
                0 if have == 0 => return Ok(()),
                0 => {
                    let what = format!("ended in the middle of a message, at {position}");
                    return Err((Saw::Eof, what));
                }
                length => have += length,
            }
        }
        if let Some(at) = up.first_wrong(position, &buffer) {
            return Err((Saw::WrongData, format!("heard a wrong byte at {at}")));
        }
        down.fill(position, &mut buffer);
        if let Some(less) = engine.corrupt.get().checked_sub(1) {
            engine.corrupt.set(less);
            buffer[size / 2] ^= 0x10;
        }
        let sent = stream.write_all(&buffer).await;
        sent.map_err(|error| failed("answer", position, &error))?;
        position += size as u64;
    }
}

fn failed(what: &str, position: u64, error: &io::Error) -> (Saw, String) {
    (Saw::of(error), format!("{what} at {position}: {error}"))
}
