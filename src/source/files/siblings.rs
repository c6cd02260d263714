//! The names that rotation gives to a file: `NAME.N`, `NAME-DATE`, also compressed.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Whether two paths have one name or are siblings; `elsewhere`, whatever their folders are.
pub fn are_related(a: &Path, b: &Path, elsewhere: bool) -> bool {
    match (a.file_name(), b.file_name()) {
        (Some(a_name), Some(b_name)) if elsewhere || a.parent() == b.parent() => {
            is_of_family(base(a_name.as_bytes()), b_name.as_bytes())
        }
        _ => false,
    }
}

/// Whether one path is that of the other's archive: `a.log.1.gz` of `a.log.1`.
pub fn is_archive_name(archive: &Path, plain: &Path) -> bool {
    let (archive, plain) = (archive.as_os_str().as_bytes(), plain.as_os_str().as_bytes());
    archive != plain && strip_compression(archive) == plain
}

/// Whether the second path has a name that rotation gives to a file of the first one's family.
pub fn is_rotation(path: &Path, candidate: &Path) -> bool {
    let plain = path.file_name().map(|name| base(name.as_bytes()));
    candidate.file_name().map(|name| name.as_bytes()) != plain
}

/// Whether a path is one that rotation gives.
pub fn has_rotated_name(path: &Path) -> bool {
    is_rotated_name(path.as_os_str().as_bytes()).is_some()
}

/// Whether this is the name before any rotation, or one that rotation makes from it: of `a.log`
/// both `a.log.1` and `a.log.2.gz`, and `a-20261121.log` with logrotate's `extension`.
pub fn is_of_family(base: &[u8], candidate: &[u8]) -> bool {
    candidate == base || is_rotated(base, candidate)
}

/// The path before any rotation of it, where this one has a rotated name.
pub fn is_rotated_name(path: &[u8]) -> Option<&[u8]> {
    let base = base(path);
    (base != path && !base.ends_with(b"/")).then_some(base)
}

/// The name before any rotation of it.
pub fn base(name: &[u8]) -> &[u8] {
    let plain = strip_compression(name);
    for at in (1..plain.len()).rev() {
        if matches!(plain[at], b'.' | b'-') && is_suffix(&plain[at..]) {
            return &plain[..at];
        }
    }
    plain
}

fn is_rotated(base: &[u8], candidate: &[u8]) -> bool {
    let plain = strip_compression(candidate);
    if let Some(rest) = plain.strip_prefix(base) {
        return is_suffix(rest) || (rest.is_empty() && plain != candidate);
    }
    // logrotate's `extension .log`: NAME-DATE.log.
    let Some(dot) = base.iter().rposition(|&byte| byte == b'.').filter(|&dot| dot > 0) else {
        return false;
    };
    let (stem, extension) = base.split_at(dot);
    plain.strip_prefix(stem).and_then(|rest| rest.strip_suffix(extension)).is_some_and(is_suffix)
}

fn strip_compression(name: &[u8]) -> &[u8] {
    [&b".gz"[..], b".zst", b".xz"]
        .iter()
        .find_map(|ending| name.strip_suffix(*ending))
        .unwrap_or(name)
}

/// `.N` with up to four digits; `-DATE` or `.DATE` with digits, dashes, `T` and underscores.
fn is_suffix(suffix: &[u8]) -> bool {
    let Some((first, rest)) = suffix.split_first() else { return false };
    let digits = rest.iter().filter(|byte| byte.is_ascii_digit()).count();
    match first {
        b'.' if digits == rest.len() && (1..=4).contains(&digits) => true,
        b'.' | b'-' => {
            digits >= 6
                && rest[0].is_ascii_digit()
                && rest.iter().all(|byte| byte.is_ascii_digit() || b"-_T.".contains(byte))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_names_are_known() {
        for candidate in [
            "app.log.1",
            "app.log.12.gz",
            "app.log-20261121",
            "app.log-20261121.gz",
            "app.log-2026-11-21",
            "app.log.20261121-1700.zst",
            "app.log.gz",
            "app-20261121.log",
            "app-20261121.log.xz",
            "app.log-1763712000",
        ] {
            assert!(is_rotated(b"app.log", candidate.as_bytes()), "{candidate}");
        }
        for candidate in [
            "app.log",
            "app.log.bak",
            "app.log.1.tmp",
            "other.log.1",
            "app.logger",
            "app.log.",
            "app.log-x",
        ] {
            assert!(!is_rotated(b"app.log", candidate.as_bytes()), "{candidate}");
        }
        let related = |a: &str, b: &str| are_related(Path::new(a), Path::new(b), false);
        assert!(related("/a/app.log.1", "/a/app.log.2.gz"));
        assert!(related("/a/app.log.1", "/a/app.log"));
        assert!(related("/a/app.log.1", "/a/app.log.1"));
        assert!(!related("/a/app.log.1", "/b/app.log.2"));
        assert!(are_related(Path::new("/a/app.log"), Path::new("/b/app.log.2"), true));
        assert!(is_archive_name(Path::new("/a/app.log.1.gz"), Path::new("/a/app.log.1")));
        assert!(!is_archive_name(Path::new("/a/app.log.1"), Path::new("/a/app.log.1")));
    }
}
