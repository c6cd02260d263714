//! Registries as Filebeat writes them. The values have the form of published ones, of its own tests
//! among others; Filebeat itself does not run here.

use super::*;

const FINGERPRINT: &str = "688797f8b82fa9513d36f6ad50aaa486f3cf46c1bc67952f7b1e094b7823a99f";

fn log_value(inode: u64, offset: u64, ttl: i64) -> String {
    format!(
        r#"{{"id":"native::{inode}-64768","prev_id":"","offset":{offset},"ttl":{ttl},"type":"log",
        "source":"/var/log/app.log","timestamp":[2061887315913,1725792819],
        "FileStateOS":{{"inode":{inode},"device":64768}},"identifier_name":"native"}}"#
    )
}

fn set(id: u64, key: &str, value: &str) -> String {
    format!(
        "{{\"op\":\"set\",\"id\":{id}}}\n{{\"k\":\"{key}\",\"v\":{}}}\n",
        value.replace('\n', "")
    )
}

struct Data(tempfile::TempDir);

impl Data {
    fn new() -> Data {
        let data = Data(tempfile::tempdir().expect("a folder"));
        data.write("registry/filebeat/meta.json", r#"{"version":"1"}"#);
        // Of the beat itself, beside the registry.
        data.write("meta.json", r#"{"uuid":"c1d9c7cb-0fb0-4f5e-8e52-0e1a5bf2f1a4"}"#);
        data
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
        fs::write(path, text).expect("write");
    }

    fn log(&self, text: &str) {
        self.write("registry/filebeat/log.json", text);
    }

    fn read(&self, name: &str) -> Vec<Position> {
        read(&self.0.path().join(name)).expect("positions")
    }

    fn error(&self, name: &str) -> String {
        read(&self.0.path().join(name)).expect_err("refused").to_string()
    }
}

fn offsets(positions: &[Position]) -> Vec<u64> {
    positions.iter().map(|position| position.offset).collect()
}

#[test]
fn the_log_input_keeps_inode_device_and_time() {
    let data = Data::new();
    data.log(&set(1, "filebeat::logs::native::16838529-64768", &log_value(16838529, 23, -1)));
    for name in ["", "registry", "registry/filebeat", "registry/filebeat/log.json"] {
        let positions = data.read(name);
        assert_eq!(positions[0].path.as_deref(), Some(Path::new("/var/log/app.log")));
        let identity = Identity::Inode { inode: 16838529, devices: vec![64768] };
        assert_eq!((&positions[0].identity, positions[0].offset), (&identity, 23), "{name:?}");
        let since = positions[0].changed.duration_since(UNIX_EPOCH).expect("after 1970");
        assert_eq!(since, Duration::new(1_725_792_819, 303_013_833));
    }
}

#[test]
fn each_identity_of_filestream_is_read() {
    let data = Data::new();
    let value = |name: &str, cursor: &str| {
        format!(
            r#"{{"cursor":{cursor},"meta":{{"source":"/tmp/foo.log","identifier_name":"{name}"}},
            "ttl":1800000000000,"updated":[280445103831836,1716310115]}}"#
        )
    };
    let cursor = r#"{"offset":121,"eof":false}"#;
    let text = [
        set(1, "filestream::my-id::native::26550-34", &value("native", cursor)),
        set(2, "filestream::a::b::native::26551-34-stdout", &value("native", cursor)),
        set(
            3,
            &format!("filestream::ai::fingerprint::{FINGERPRINT}"),
            &value("fingerprint", "null"),
        ),
        set(4, "filestream::my-id::path::/tmp/foo.log", &value("path", cursor)),
        set(5, "filestream::m::inode_marker::26552-host-7", &value("inode_marker", cursor)),
        set(6, "filestream::x::new_kind::1", &value("new_kind", cursor)),
        set(7, "journald::everything", r#"{"cursor":{"position":"s=1"},"ttl":0}"#),
    ];
    data.log(&text.concat());
    let mut positions = data.read("");
    positions.sort_by_key(|position| format!("{:?}", position.identity));
    let identities: Vec<Identity> = positions.iter().map(|p| p.identity.clone()).collect();
    let inode = |inode, devices| Identity::Inode { inode, devices };
    assert_eq!(
        identities,
        [
            Identity::Content(FINGERPRINT.to_owned()),
            inode(26550, vec![34]),
            inode(26551, vec![34]),
            inode(26552, vec![]),
            Identity::Path,
            Identity::Unknown("new_kind".to_owned()),
        ]
    );
    assert_eq!(offsets(&positions), [0, 121, 121, 121, 121, 121]);
}

#[test]
fn a_checkpoint_is_the_base_of_the_log() {
    let data = Data::new();
    let keyed = |inode: u64, offset| {
        let value = log_value(inode, offset, -1);
        format!("{{\"_key\":\"filebeat::logs::native::{inode}-64768\",{}", &value[1..])
    };
    // An older one, which a crash left there.
    data.write("registry/filebeat/4.json", &format!("[{}]", keyed(9, 9)));
    let checkpoint = format!("[\n{},\n{},\n{}\n]", keyed(1, 10), keyed(2, 20), keyed(3, 30));
    data.write("registry/filebeat/12.json", &checkpoint);
    data.write("registry/filebeat/active.dat", "/var/lib/filebeat/registry/filebeat/12.json");
    let text = [
        // From before the checkpoint.
        set(12, "filebeat::logs::native::1-64768", &log_value(1, 5, -1)),
        set(13, "filebeat::logs::native::2-64768", &log_value(2, 21, -1)),
        "{\"op\":\"remove\",\"id\":14}\n{\"k\":\"filebeat::logs::native::3-64768\"}\n".to_owned(),
    ];
    data.log(&text.concat());
    assert_eq!(offsets(&data.read("")), [10, 21]);
}

#[test]
fn states_on_their_way_out_are_none_and_unclaimed_ones_are_stale() {
    let data = Data::new();
    let text = [
        set(1, "filebeat::logs::native::1-64768", &log_value(1, 10, 0)),
        set(2, "filebeat::logs::native::2-64768", &log_value(2, 20, -2)),
        // Found, with Go's zero time.
        set(
            3,
            "filestream::ai::native::3-64768",
            r#"{"ttl":0,"updated":[281470681743360,18446744011573954816],"cursor":null,"meta":{"source":"/a"}}"#,
        ),
    ];
    data.log(&text.concat());
    let positions = data.read("");
    assert_eq!(offsets(&positions), [20, 0]);
    assert_eq!([positions[0].stale, positions[1].stale], [true, false]);
    // As old as the registry at most.
    assert!(positions[1].changed > positions[0].changed);
}

#[test]
fn registries_before_7_9_are_arrays() {
    let text = r#"[{"source":"/tmp/test.log","offset":10,
        "timestamp":"2018-07-18T21:51:43.529893808+02:00","ttl":-1,"type":"log","meta":{},
        "FileStateOS":{"inode":8604592318,"device":16777220}}]"#;
    let dir = tempfile::tempdir().expect("a folder");
    let six = Data(dir);
    six.write("registry", text);
    six.write("meta.json", r#"{"uuid":"c1d9c7cb-0fb0-4f5e-8e52-0e1a5bf2f1a4"}"#);
    let seven = Data::new();
    seven.write("registry/filebeat/meta.json", r#"{"version":"0"}"#);
    seven.write("registry/filebeat/data.json", text);
    for (data, names) in [(six, ["", "registry"]), (seven, ["", "registry/filebeat/data.json"])] {
        for name in names {
            let positions = data.read(name);
            let identity = Identity::Inode { inode: 8604592318, devices: vec![16777220] };
            assert_eq!((&positions[0].identity, positions[0].offset), (&identity, 10), "{name:?}");
            let since = positions[0].changed.duration_since(UNIX_EPOCH).expect("after 1970");
            assert_eq!(since, Duration::new(1_531_943_503, 529_893_808));
        }
    }
}

#[test]
fn every_damage_is_an_error_that_says_what_to_do() {
    let good = set(1, "filebeat::logs::native::1-64768", &log_value(1, 10, -1));
    let whole = good.clone() + &set(2, "filebeat::logs::native::1-64768", &log_value(1, 20, -1));
    for torn in 1..whole.trim_end().len() {
        // What ends with a change is a whole log.
        if whole[..torn].trim_end() == good.trim_end() {
            continue;
        }
        let data = Data::new();
        data.log(&whole[..torn]);
        let error = data.error("");
        assert!(error.contains("log.json: is damaged") && error.contains(MEND), "{torn}: {error}");
    }
    for (name, text, says) in [
        ("log.json", "\0\0\0\0", "is damaged"),
        ("log.json", "{\"op\":\"set\",\"id\":3}\n{\"k\":\"x\",\"v\":{}}\n", "3 follows change 0"),
        (
            "log.json",
            "{\"op\":\"swap\",\"id\":1}\n{\"k\":\"x\",\"v\":{}}\n",
            "change 1 is \"swap\"",
        ),
        ("7.json", "[{\"_key\":\"filebeat::logs::native::1-1\",\"off", "is damaged"),
        ("7.json", "[{\"offset\":1}]", "_key"),
        ("meta.json", "{\"version\":\"2\"}", "version \"2\" of the registry is not known"),
    ] {
        let data = Data::new();
        data.log(&good);
        data.write(&format!("registry/filebeat/{name}"), text);
        let error = data.error("");
        assert!(error.contains(name) && error.contains(says), "{error}");
    }
    let data = Data::new();
    data.log(&set(1, "filebeat::logs::native::1-1", r#"{"source":"/a","offset":-5}"#));
    assert!(data.error("").contains("is damaged"), "{}", data.error(""));
    let empty = Data(tempfile::tempdir().expect("a folder"));
    assert!(empty.error("").contains("no registry of Filebeat here"));
}

#[test]
fn a_running_filebeat_is_refused() {
    let data = Data::new();
    data.log(&set(1, "filebeat::logs::native::1-64768", &log_value(1, 10, -1)));
    data.write("filebeat.lock", "");
    let lock = fs::File::open(data.0.path().join("filebeat.lock")).expect("open");
    assert_eq!(data.read("registry/filebeat").len(), 1);
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).expect("lock");
    assert!(data.error("registry/filebeat").contains("Filebeat still runs"));
}
