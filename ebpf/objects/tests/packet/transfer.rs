//! Much by TCP, both ways. The proxy's tests use this file, too.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::Duration;

/// Only a failure takes so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Sends so many bytes from one end of a connection; the other end sends each back, inverted.
#[track_caller]
pub(crate) fn both_ways(mut near: TcpStream, mut far: TcpStream, bytes: usize) {
    for end in [&near, &far] {
        end.set_read_timeout(Some(PATIENCE)).unwrap();
        end.set_write_timeout(Some(PATIENCE)).unwrap();
    }
    let sent: Vec<u8> = (0..bytes).map(|i| (i / 7 % 251) as u8).collect();
    let echo = thread::spawn(move || {
        let mut all = Vec::new();
        far.read_to_end(&mut all).unwrap();
        all.iter_mut().for_each(|byte| *byte = !*byte);
        far.write_all(&all).unwrap();
    });
    near.write_all(&sent).unwrap();
    near.shutdown(Shutdown::Write).unwrap();
    let mut back = Vec::new();
    near.read_to_end(&mut back).unwrap();
    echo.join().unwrap();
    assert_eq!(back.len(), sent.len());
    assert!(back.iter().zip(&sent).all(|(back, sent)| *back == !*sent), "the bytes are others");
}
