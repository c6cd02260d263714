//! A scripted stand-in between the receiver and the real Elasticsearch: for a while it answers some requests itself, or
//! half, or not at all; then it lets everything through.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use serde_json::{Value, json};

use super::servers::http;

/// What happens to one bulk request that holds documents.
#[derive(Clone, Debug)]
pub enum Act {
    /// Nothing is done; this status and body are the answer.
    Answer(u16, &'static str),
    /// Everything is done; half of the answer arrives, then the connection is cut.
    HalfAnswer,
    /// Everything is done; the connection is cut before the answer.
    NoAnswer,
    /// The connection is cut before anything is done.
    Cut,
    /// Everything is done; the answer says that, of fewer documents than there were.
    FewerItems,
    /// Every other document is passed on; the others are answered with this status and kind of error.
    EveryOther(u16, &'static str),
}

/// The stand-in; it serves until the test program ends.
pub struct Proxy {
    port: u16,
    script: Arc<Script>,
}

struct Script {
    node: String,
    acts: Mutex<VecDeque<Act>>,
    hold: Mutex<Hold>,
    released: Condvar,
}

#[derive(Default)]
struct Hold {
    on: bool,
    waiting: usize,
    /// Requests that may pass all the same.
    passes: usize,
}

impl Proxy {
    /// In front of `node` (`127.0.0.1:PORT`); one act for each of the first bulk requests.
    pub fn start(node: &str, acts: &[Act]) -> Proxy {
        Proxy::start_at(0, node, acts)
    }

    /// The same on this port of 127.0.0.1.
    pub fn start_at(port: u16, node: &str, acts: &[Act]) -> Proxy {
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("the port is free");
        let port = listener.local_addr().expect("an address").port();
        let acts = Mutex::new(acts.iter().cloned().collect());
        let script = Script {
            node: node.to_owned(),
            acts,
            hold: Mutex::default(),
            released: Condvar::new(),
        };
        let script = Arc::new(script);
        let shared = Arc::clone(&script);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let script = Arc::clone(&shared);
                // A client that goes away ends its thread; that is no failure.
                thread::spawn(move || script.serve(stream));
            }
        });
        Proxy { port, script }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Bulk requests are neither passed on nor answered until [`Proxy::release`].
    pub fn hold(&self) {
        self.script.holding().on = true;
    }

    /// How many bulk requests are held.
    pub fn held(&self) -> usize {
        self.script.holding().waiting
    }

    /// One of those that are held is passed on, or else the next one that comes.
    pub fn pass_one(&self) {
        self.script.holding().passes += 1;
        self.script.released.notify_one();
    }

    /// What was held is passed on, and all that follows.
    pub fn release(&self) {
        self.script.holding().on = false;
        self.script.released.notify_all();
    }

    /// How many acts are still to come.
    pub fn left(&self) -> usize {
        self.script.acts().len()
    }
}

impl Script {
    fn acts(&self) -> std::sync::MutexGuard<'_, VecDeque<Act>> {
        self.acts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn holding(&self) -> std::sync::MutexGuard<'_, Hold> {
        self.hold.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while_held(&self) {
        let mut hold = self.holding();
        hold.waiting += 1;
        while hold.on && hold.passes == 0 {
            hold = self.released.wait(hold).unwrap_or_else(PoisonError::into_inner);
        }
        hold.passes = hold.passes.saturating_sub(1);
        hold.waiting -= 1;
    }

    fn serve(&self, stream: TcpStream) -> io::Result<()> {
        let mut writer = stream.try_clone()?;
        let mut reader = BufReader::new(stream);
        while let Some(request) = Request::read(&mut reader)? {
            let bulk = request.path.starts_with("/_bulk") && !request.body.is_empty();
            if bulk {
                self.wait_while_held();
            }
            let act = if bulk { self.acts().pop_front() } else { None };
            let pass = |body: &[u8]| {
                http(&self.node, &request.method, &request.path, &request.content_type, body)
            };
            match act {
                None => {
                    let (status, body) = pass(&request.body)?;
                    answer(&mut writer, status, body.as_bytes(), body.len())?;
                }
                Some(Act::Answer(status, body)) => {
                    answer(&mut writer, status, body.as_bytes(), body.len())?;
                }
                Some(Act::HalfAnswer) => {
                    let (status, body) = pass(&request.body)?;
                    let half = &body.as_bytes()[..body.len() / 2];
                    answer(&mut writer, status, half, body.len())?;
                    return Ok(());
                }
                Some(Act::NoAnswer) => {
                    pass(&request.body)?;
                    return Ok(());
                }
                Some(Act::Cut) => return Ok(()),
                Some(Act::FewerItems) => {
                    let (status, body) = pass(&request.body)?;
                    let mut body: Value = serde_json::from_str(&body)?;
                    if let Value::Array(items) = &mut body["items"] {
                        items.pop();
                    }
                    let body = body.to_string();
                    answer(&mut writer, status, body.as_bytes(), body.len())?;
                }
                Some(Act::EveryOther(status, kind)) => {
                    let body = every_other(&request.body, status, kind, pass)?;
                    answer(&mut writer, 200, body.as_bytes(), body.len())?;
                }
            }
        }
        Ok(())
    }
}

/// Passes on every other document, and puts the node's items between those of the script.
fn every_other(
    body: &[u8],
    status: u16,
    kind: &str,
    pass: impl Fn(&[u8]) -> io::Result<(u16, String)>,
) -> io::Result<String> {
    let lines: Vec<&[u8]> = body.split_inclusive(|byte| *byte == b'\n').collect();
    let documents: Vec<&[&[u8]]> = lines.chunks(2).collect();
    let kept: Vec<u8> = documents.iter().step_by(2).flat_map(|pair| pair.concat()).collect();
    let (_, stored) = pass(&kept)?;
    let stored: Value = serde_json::from_str(&stored)?;
    let mut stored = stored["items"].as_array().cloned().unwrap_or_default().into_iter();
    let items: Vec<Value> = documents
        .iter()
        .enumerate()
        .map(|(number, pair)| {
            if number % 2 == 0 {
                return stored.next().unwrap_or_default();
            }
            let action: Value = serde_json::from_slice(pair[0]).unwrap_or_default();
            json!({"create": {"_index": action["create"]["_index"], "status": status,
                "error": {"type": kind, "reason": "as the test has it"}}})
        })
        .collect();
    Ok(json!({"errors": true, "items": items}).to_string())
}

fn answer(writer: &mut TcpStream, status: u16, body: &[u8], length: usize) -> io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    );
    writer.write_all(head.as_bytes())?;
    writer.write_all(body)?;
    writer.flush()
}

struct Request {
    method: String,
    path: String,
    content_type: String,
    body: Vec<u8>,
}

impl Request {
    /// `None` where the client has closed.
    fn read(reader: &mut BufReader<TcpStream>) -> io::Result<Option<Request>> {
        let mut first = String::new();
        if reader.read_line(&mut first)? == 0 {
            return Ok(None);
        }
        let mut words = first.split_whitespace().map(str::to_owned);
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let (mut length, mut content_type) = (0, "application/json".to_owned());
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.trim().parse().unwrap_or(0),
                "content-type" => content_type = value.trim().to_owned(),
                _ => {}
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        Ok(Some(Request { method, path, content_type, body }))
    }
}
