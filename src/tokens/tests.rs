use super::*;

#[test]
fn too_many_open_files_are_no_lack_of_a_token() {
    let advice = |number| file_advice(&io::Error::from_raw_os_error(number), "receiver");
    assert!(advice(libc::EMFILE).contains("LimitNOFILE"));
    assert!(advice(libc::ENOENT).contains("waybill token"));
}

fn file() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("tempdir");
    let file = dir.path().join("tokens.toml");
    (dir, file)
}

fn find(file: &Path, token: &str) -> Option<Entry> {
    Tokens::load(file).expect("load").find(&hash(token), Timestamp::now()).cloned()
}

#[test]
fn a_minted_token_is_found_and_is_not_in_the_file() {
    let (_dir, file) = file();
    let types = vec!["nginx".parse().expect("type")];
    let token = mint(&file, "web-1", Terms { types: Some(types.clone()), ..Terms::default() })
        .expect("mint");
    assert_eq!(token.len(), 3 + 43);
    let entry = find(&file, &token).expect("an entry");
    assert_eq!((entry.name.as_str(), entry.allowed_types()), ("web-1", types));
    assert!(find(&file, "wb_other").is_none());
    let text = std::fs::read_to_string(&file).expect("text");
    assert!(!text.contains(&token), "{text}");
    assert_eq!(std::fs::metadata(&file).expect("meta").permissions().mode() & 0o777, FILE_MODE);
    let again = mint(&file, "web-1", Terms::default()).expect_err("exists").to_string();
    assert!(again.contains("--rotate"), "{again}");
}

#[test]
fn rotation_keeps_the_sender_id_and_ends_the_old_token() {
    let (_dir, file) = file();
    let old = mint(&file, "web-1", Terms::default()).expect("mint");
    let id = find(&file, &old).expect("entry").id;
    revoke(&file, "web-1").expect("revoke");
    assert!(find(&file, &old).is_none(), "revoked");
    let new = rotate(&file, "web-1", Terms::default()).expect("rotate");
    assert_eq!(find(&file, &new).expect("entry").id, id);
    assert!(find(&file, &old).is_none());
    assert!(matches!(rotate(&file, "nobody", Terms::default()), Err(TokensError::Unknown { .. })));
}

#[test]
fn a_token_ends_at_its_expiry() {
    let (_dir, file) = file();
    let later = Timestamp::now() + jiff::SignedDuration::from_secs(3600);
    let token =
        mint(&file, "web-1", Terms { expires: Some(later), ..Terms::default() }).expect("mint");
    let tokens = Tokens::load(&file).expect("load");
    let before = later - jiff::SignedDuration::from_secs(1);
    assert!(tokens.find(&hash(&token), before).is_some());
    assert_eq!(tokens.next_expiry(before), Some(later));
    assert!(tokens.find(&hash(&token), later).is_none());
    assert_eq!(tokens.next_expiry(later), None);
    let past = Terms { expires: Some(Timestamp::UNIX_EPOCH), ..Terms::default() };
    assert!(matches!(mint(&file, "web-2", past), Err(TokensError::Expired(_))));
}

#[test]
fn a_file_edited_by_hand_is_read_and_its_faults_are_named() {
    let good = format!(
        "[[token]]\nname = \"a\"\nid = \"01890a5d-ac96-774b-bcce-b302099a8057\"\n\
         sha256 = \"{}\"\ncreated = \"2026-01-01T00:00:00Z\"\n",
        "ab".repeat(32)
    );
    assert_eq!(Tokens::parse(&good).expect("good").entries().len(), 1);
    assert_eq!(Tokens::parse("").expect("empty"), Tokens::default());
    for (bad, word) in [
        (good.replace("name", "nam"), "nam"),
        (good.replace("abab", "xyz"), "64 hexadecimal"),
        (format!("{good}chain_key = \"short\"\n"), "44 characters"),
        (format!("{good}{good}"), "name"),
        (format!("{good}{}", good.replace("\"a\"", "\"b\"")), "same token"),
        ("token = 5".to_owned(), "token"),
    ] {
        let reason = Tokens::parse(&bad).expect_err(&bad);
        assert!(reason.contains(word), "{reason}");
    }
}

#[test]
fn a_chain_key_stays_until_it_is_replaced_or_dropped_and_closes_the_file_to_others() {
    let (_dir, file) = file();
    mint(&file, "plain", Terms::default()).expect("mint");
    let open = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(&file, open.clone()).expect("chmod");
    let mode = || std::fs::metadata(&file).expect("meta").permissions().mode() & 0o777;
    rotate(&file, "plain", Terms::default()).expect("rotate");
    assert_eq!(mode(), 0o644, "nothing in it is secret");
    let key = || ChainKey::mint().expect("random bytes");
    let terms = |chain| Terms { chain, ..Terms::default() };
    let (first, second) = (key(), key());
    let token = mint(&file, "web-1", terms(ChainTerm::Require(first.clone()))).expect("mint");
    assert_eq!(mode(), 0o640);
    let key_of = |token: &str| find(&file, token).expect("an entry").chain_key;
    assert_eq!(key_of(&token), Some(first.clone()));
    let rotated = |chain| rotate(&file, "web-1", terms(chain)).expect("rotate");
    assert_eq!(key_of(&rotated(ChainTerm::Keep)), Some(first));
    assert_eq!(key_of(&rotated(ChainTerm::Require(second.clone()))), Some(second));
    assert_eq!(key_of(&rotated(ChainTerm::Drop)), None);
}

#[test]
fn concurrent_edits_lose_no_entry() {
    let (_dir, file) = file();
    std::thread::scope(|scope| {
        for number in 0..8 {
            let file = &file;
            scope.spawn(move || mint(file, &format!("web-{number}"), Terms::default()));
        }
    });
    assert_eq!(Tokens::load(&file).expect("load").entries().len(), 8);
}

/// What root makes in the folder of a service, the service reads; elsewhere nobody else does.
#[test]
fn a_new_file_of_root_takes_the_group_of_a_closed_folder() {
    const GROUP: u32 = 4711;
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root gives a folder to another group");
        return;
    }
    for (folder_mode, group, mode) in
        [(0o750, GROUP, SERVICE_MODE), (0o755, 0, FILE_MODE), (0o710, 0, FILE_MODE)]
    {
        let (dir, file) = file();
        std::os::unix::fs::chown(dir.path(), None, Some(GROUP)).expect("chown");
        let permissions = std::fs::Permissions::from_mode(folder_mode);
        std::fs::set_permissions(dir.path(), permissions).expect("chmod");
        mint(&file, "web-1", Terms::default()).expect("mint");
        let made = std::fs::metadata(&file).expect("meta");
        assert_eq!((made.mode() & 0o777, made.gid()), (mode, group), "{folder_mode:o}");
    }
}
