//! `deny.toml` holds even where cargo-deny is not installed: one TLS stack, one WebSocket library.

use std::fs;

use toml::{Table, Value};

use crate::support::servers::root;

fn table(file: &str) -> Table {
    let text = fs::read_to_string(root().join(file)).expect("the file is there");
    text.parse().expect("TOML")
}

#[test]
fn what_deny_toml_bans_is_not_in_the_lock_file() {
    let lock = table("Cargo.lock");
    let packages = lock["package"].as_array().expect("packages");
    let count = |name: &str| packages.iter().filter(|p| p["name"].as_str() == Some(name)).count();
    let deny = table("deny.toml");
    let bans = deny["bans"]["deny"].as_array().expect("bans.deny");
    assert!(bans.len() > 5, "only {} bans found", bans.len());
    for ban in bans {
        let name = ban["crate"].as_str().expect("a name");
        let once = ban.get("deny-multiple-versions").and_then(Value::as_bool) == Some(true);
        assert_eq!(count(name), usize::from(once), "{name}");
    }
}
