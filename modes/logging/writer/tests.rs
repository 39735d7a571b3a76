#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use super::*;

/// Hands each write over to the test, and waits for its leave.
struct Sink {
    writes: Sender<Vec<u8>>,
    leave: Receiver<()>,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writes.send(bytes.to_vec()).unwrap();
        // No more leaves: everything is allowed.
        let _ = self.leave.recv();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn log(lines: &Lines, line: &str) {
    let mut writer = lines.make_writer();
    writer.write_all(line.as_bytes()).unwrap();
}

#[test]
fn lines_of_many_threads_come_whole_in_order_and_in_few_writes() {
    let (writes, written) = channel();
    let (allow, leave) = channel();
    let (lines, guard) = start(Sink { writes, leave }).unwrap();
    drop(allow);
    thread::scope(|scope| {
        for thread in 0..4 {
            let lines = &lines;
            scope.spawn(move || {
                for number in 0..1000 {
                    log(lines, &format!("thread {thread} line {number}\n"));
                }
            });
        }
    });
    drop(guard);
    let writes: Vec<_> = written.try_iter().collect();
    assert!(writes.len() < 400, "{} writes", writes.len());
    let text = String::from_utf8(writes.concat()).unwrap();
    let mut next = HashMap::new();
    for line in text.lines() {
        let words: Vec<_> = line.split(' ').collect();
        let expected = next.entry(words[1]).or_insert(0);
        assert_eq!(words[3], expected.to_string(), "{line}");
        *expected += 1;
    }
    assert_eq!(next.values().sum::<i32>(), 4000);
}

#[test]
fn a_stalled_reader_stops_nobody_and_what_is_lost_is_counted() {
    let (writes, written) = channel();
    let (allow, leave) = channel();
    let (lines, guard) = start(Sink { writes, leave }).unwrap();
    log(&lines, "first\n");
    assert_eq!(written.recv().unwrap(), b"first\n");
    // The writer hangs in its write. All that fits is kept, the rest is lost; nobody waits.
    let line = format!("{}\n", "x".repeat(1023));
    for _ in 0..LIMIT / line.len() + 3 {
        log(&lines, &line);
    }
    allow.send(()).unwrap();
    let second = written.recv().unwrap();
    let end = String::from_utf8_lossy(&second[LIMIT..]);
    assert_eq!(end, "3 lines of the log were lost\n");
    assert_eq!(lines.lost_in_all(), 3);

    // Neither does it keep the program from ending.
    let started = Instant::now();
    drop(guard);
    assert!(started.elapsed() < LAST_WORDS * 5);
    drop(allow);
}
