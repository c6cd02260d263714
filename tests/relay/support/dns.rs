//! A DNS server of the tests' own for the near host of a [`Wire`]: its answer changes at once.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::network::Wire;

/// To each question, whatever the name.
#[derive(Clone, Copy, Debug)]
pub enum Answer {
    /// SERVFAIL (RFC 1035 §4.1.1).
    Failure,
    /// None.
    Silence,
    /// This one, and no IPv6 address.
    Address(Ipv4Addr),
}

/// It serves until the test program ends.
pub struct Dns {
    script: Arc<Mutex<Script>>,
}

struct Script {
    answer: Answer,
    asked: usize,
}

impl Dns {
    /// Asked by everything that starts on the near host from now on.
    pub fn start(wire: &Wire, answer: Answer) -> Dns {
        let socket = wire.near_resolver();
        let script = Arc::new(Mutex::new(Script { answer, asked: 0 }));
        let shared = Arc::clone(&script);
        thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok((length, client)) = socket.recv_from(&mut buffer) {
                let answer = {
                    let mut script = lock(&shared);
                    script.asked += 1;
                    script.answer
                };
                if let Some(reply) = reply(&buffer[..length], answer) {
                    // A client that is gone is no failure.
                    let _ = socket.send_to(&reply, client);
                }
            }
        });
        Dns { script }
    }

    /// From now on.
    pub fn set(&self, answer: Answer) {
        *lock(&self.script) = Script { answer, asked: 0 };
    }

    /// Questions since this answer was set.
    pub fn asked(&self) -> usize {
        lock(&self.script).asked
    }
}

/// What goes back to a question, where anything does (RFC 1035 §4).
fn reply(question: &[u8], answer: Answer) -> Option<Vec<u8>> {
    const HEADER: usize = 12;
    const A: &[u8] = &[0, 1];
    // The name ends at its empty label; type and class follow.
    let name = question.get(HEADER..)?.iter().position(|byte| *byte == 0)?;
    let asked = question.get(HEADER..HEADER + name + 5)?;
    let wants_address = asked[name + 1..].starts_with(A);
    let (code, address) = match answer {
        Answer::Silence => return None,
        Answer::Failure => (2, None),
        Answer::Address(address) => (0, Some(address).filter(|_| wants_address)),
    };
    let mut reply = question[..2].to_vec();
    // A response, recursion desired and available; one question, perhaps one answer.
    reply.extend([0x81, 0x80 | code, 0, 1, 0, u8::from(address.is_some()), 0, 0, 0, 0]);
    reply.extend(asked);
    if let Some(address) = address {
        // The name of the question, type A, class IN, not to be kept, four bytes.
        reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4]);
        reply.extend(address.octets());
    }
    Some(reply)
}

fn lock(script: &Mutex<Script>) -> MutexGuard<'_, Script> {
    script.lock().unwrap_or_else(PoisonError::into_inner)
}
