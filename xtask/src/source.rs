//! As much understanding of Rust text as `tidy` needs: what is code, what is a test, which paths are named where.
//!
//! Pure: text in, facts out. No parser: comments and literals are blanked, `#[cfg(test)]` items too, and what is left
//! is read word by word. Everything keeps its line, because findings are reported with it.

/// `text` with comments and the contents of string and character literals replaced by blanks.
pub(crate) fn code(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if bytes[at..].starts_with(b"//") => line_end(bytes, at),
            b'/' if bytes[at..].starts_with(b"/*") => comment_end(bytes, at),
            b'"' => string_end(bytes, at + 1),
            b'\'' => match character_end(text, at) {
                Some(end) => end,
                None => at + 1,
            },
            byte if is_word(byte) => {
                let end = word_end(bytes, at);
                match raw_string_end(bytes, &bytes[at..end], end) {
                    // The prefix is blanked with the string: neither says anything.
                    Some(end) => end,
                    None => {
                        at = end;
                        continue;
                    }
                }
            }
            _ => {
                at += 1;
                continue;
            }
        };
        if end > at + 1 {
            blank(&mut out, at, end);
        }
        at = end;
    }
    // Blanked spans begin and end at ASCII bytes, so what is left is as valid as it was.
    String::from_utf8(out).unwrap_or_default()
}

/// `code` (the result of [`code`]) with every item under `#[cfg(test)]` replaced by blanks.
pub(crate) fn without_tests(code: &str) -> String {
    let mut out = code.as_bytes().to_vec();
    let mut from = 0;
    while let Some(found) = code[from..].find("#[cfg(test)]").map(|found| from + found) {
        let end = item_end(code.as_bytes(), found);
        blank(&mut out, found, end);
        from = end;
    }
    String::from_utf8(out).unwrap_or_default()
}

/// The names of the modules in files of their own that `code` declares for tests: `#[cfg(test)] mod fake;`.
pub(crate) fn test_modules(code: &str) -> Vec<&str> {
    let declared = code.match_indices("#[cfg(test)]").filter_map(|(at, _)| {
        let item = code[at..item_end(code.as_bytes(), at)].strip_suffix(';')?;
        item.rsplit_once("mod ").map(|(_, name)| name.trim())
    });
    declared.collect()
}

/// Where the item at `start` ends: after its block, or after its semicolon.
fn item_end(bytes: &[u8], start: usize) -> usize {
    let mut depth = 0_usize;
    for (at, byte) in bytes.iter().enumerate().skip(start) {
        match byte {
            b'{' => depth += 1,
            b'}' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return at + 1;
                }
            }
            b';' if depth == 0 => return at + 1,
            _ => {}
        }
    }
    bytes.len()
}

/// The line, counted from 1, of a place in a text.
pub(crate) fn line_of(text: &str, offset: usize) -> usize {
    1 + text.as_bytes().iter().take(offset).filter(|&&byte| byte == b'\n').count()
}

/// Where `phrase` stands in `code` as whole words: an end of it that is a letter does not touch another letter.
/// With `open_ended` its last word may go on (`disk.write` also finds `disk.write_zeroes`).
pub(crate) fn find_words(code: &str, phrase: &str, open_ended: bool) -> Vec<usize> {
    let bytes = code.as_bytes();
    let touches = |edge: Option<&u8>, other: Option<&u8>| {
        edge.is_some_and(|&byte| is_word(byte)) && other.is_some_and(|&byte| is_word(byte))
    };
    let stands_alone = |at: &usize| {
        let end = at + phrase.len();
        let before = at.checked_sub(1).and_then(|before| bytes.get(before));
        !touches(phrase.as_bytes().first(), before)
            && (open_ended || !touches(phrase.as_bytes().last(), bytes.get(end)))
    };
    code.match_indices(phrase).map(|(at, _)| at).filter(stands_alone).collect()
}

/// A path that code names: its segments, and where its last one stands.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Named {
    /// The segments; a leading `crate`, `self` or `super` is resolved to `crate` and the modules below it.
    pub(crate) segments: Vec<String>,
    /// The offset of the last segment.
    pub(crate) offset: usize,
}

impl Named {
    /// The path as it is written.
    pub(crate) fn text(&self) -> String {
        self.segments.join("::")
    }
}

/// Every path of at least two segments in `code`, groups taken apart: `use a::{b, c::d}` names `a::b` and `a::c::d`.
/// `file` tells what `self` and `super` mean, and `blockferry` is the same as `crate`.
pub(crate) fn paths(file: &str, code: &str) -> Vec<Named> {
    let bytes = code.as_bytes();
    let mut named = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        if is_word(bytes[at]) {
            at = tree(code, at, &[], &mut named);
        } else {
            at += 1;
        }
    }
    named.retain(|path| path.segments.len() > 1);
    for path in &mut named {
        path.segments = resolve(file, &path.segments);
    }
    named
}

/// Reads one path, or group of paths, that starts at `at` below `above`. Returns the place after it.
fn tree(code: &str, at: usize, above: &[String], named: &mut Vec<Named>) -> usize {
    let bytes = code.as_bytes();
    let mut at = skip_blanks(bytes, at);
    if bytes.get(at) == Some(&b'{') {
        at += 1;
        while at < bytes.len() && bytes[at] != b'}' {
            at = tree(code, at, above, named);
            // What may stand between an element and its comma (`as name`, `::*`) names nothing.
            at += bytes[at..].iter().take_while(|byte| !matches!(byte, b',' | b'}')).count();
            at += usize::from(bytes.get(at) == Some(&b','));
        }
        return (at + 1).min(bytes.len());
    }
    let end = word_end(bytes, at);
    if end == at {
        return at;
    }
    let mut segments = above.to_vec();
    segments.push(code[at..end].to_owned());
    let after = skip_blanks(bytes, end);
    if bytes[after..].starts_with(b"::") {
        let below = skip_blanks(bytes, after + 2);
        if bytes.get(below).is_some_and(|&byte| is_word(byte) || byte == b'{') {
            return tree(code, below, &segments, named);
        }
    }
    named.push(Named { segments, offset: at });
    end
}

/// A path seen from the crate's root.
fn resolve(file: &str, segments: &[String]) -> Vec<String> {
    let mut absolute = match segments.first().map(String::as_str) {
        Some("self" | "super") => module(file),
        Some("crate" | "blockferry") => vec!["crate".to_owned()],
        _ => return segments.to_vec(),
    };
    let mut rest = segments;
    while let Some((first, below)) = rest.split_first() {
        match first.as_str() {
            "super" => drop(absolute.pop()),
            "self" | "crate" | "blockferry" => {}
            _ => break,
        }
        rest = below;
    }
    if absolute.is_empty() {
        absolute.push("crate".to_owned());
    }
    absolute.extend(rest.iter().filter(|segment| *segment != "self").cloned());
    absolute
}

/// The module that a file under `src/` is.
pub(crate) fn module(file: &str) -> Vec<String> {
    let below = file.strip_prefix("src/").unwrap_or(file);
    let stem = below.strip_suffix(".rs").unwrap_or(below);
    let names = stem.split('/').filter(|name| !matches!(*name, "mod" | "lib" | "main"));
    std::iter::once("crate").chain(names).map(str::to_owned).collect()
}

/// The decimal integer literals in `code`, whatever their type, and where they stand.
pub(crate) fn decimals(code: &str) -> Vec<(u64, usize)> {
    let bytes = code.as_bytes();
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let end = word_end(bytes, at);
        let word = code[at..end].replace('_', "");
        let typed = ["u8", "u16", "u32", "u64", "usize", "i32", "i64"].iter().find_map(|kind| word.strip_suffix(kind));
        if let Ok(value) = typed.unwrap_or(&word).parse() {
            found.push((value, at));
        }
        at = end.max(at + 1);
    }
    found
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || !byte.is_ascii()
}

fn word_end(bytes: &[u8], at: usize) -> usize {
    at + bytes[at..].iter().take_while(|&&byte| is_word(byte)).count()
}

fn skip_blanks(bytes: &[u8], at: usize) -> usize {
    at + bytes[at..].iter().take_while(|byte| byte.is_ascii_whitespace()).count()
}

fn blank(out: &mut [u8], from: usize, to: usize) {
    out[from..to].iter_mut().filter(|byte| **byte != b'\n').for_each(|byte| *byte = b' ');
}

fn line_end(bytes: &[u8], at: usize) -> usize {
    at + bytes[at..].iter().take_while(|&&byte| byte != b'\n').count()
}

/// After a block comment; they nest.
fn comment_end(bytes: &[u8], mut at: usize) -> usize {
    let mut depth = 0_usize;
    while at < bytes.len() {
        if bytes[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if bytes[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                break;
            }
        } else {
            at += 1;
        }
    }
    at.min(bytes.len())
}

/// After the quote that closes a string whose content starts at `at`.
fn string_end(bytes: &[u8], mut at: usize) -> usize {
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// After the raw string that `prefix` (a word that ends at `at`) begins, if it does.
fn raw_string_end(bytes: &[u8], prefix: &[u8], at: usize) -> Option<usize> {
    if !matches!(prefix, b"r" | b"br" | b"cr") {
        return None;
    }
    let hashes = bytes[at..].iter().take_while(|&&byte| byte == b'#').count();
    if bytes.get(at + hashes) != Some(&b'"') {
        return None;
    }
    let close = [b"\"".as_slice(), &b"#".repeat(hashes)].concat();
    let content = at + hashes + 1;
    let length = bytes[content..].windows(close.len()).position(|window| window == close);
    Some(length.map_or(bytes.len(), |length| content + length + close.len()))
}

/// After the character literal at `at`, or `None` where the quote begins a lifetime.
fn character_end(text: &str, at: usize) -> Option<usize> {
    let mut letters = text[at + 1..].char_indices();
    let (_, first) = letters.next()?;
    if first == '\\' {
        let escaped = letters.nth(1)?;
        let close = text[at + 1 + escaped.0..].find('\'')?;
        return Some(at + 1 + escaped.0 + close + 1);
    }
    let (place, second) = letters.next()?;
    (second == '\'').then_some(at + 1 + place + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked_and_lines_kept() {
        let text = "a(); // todo!\n/* b /* c */\n d */ \
            e(\"un\\\"safe\", 'x', '\\'', '\\u{41}', b\"y\"); f::<'a>(r#\"z\"\n\"#);";
        let seen = code(text);
        assert_eq!(seen.lines().count(), text.lines().count());
        assert_eq!(seen.len(), text.len());
        let words: Vec<&str> = seen.split_whitespace().collect();
        assert_eq!(words, ["a();", "e(", ",", ",", ",", ",", "b", ");", "f::<'a>(", ");"]);
    }

    #[test]
    fn a_lifetime_is_no_character() {
        assert_eq!(code("fn f<'a>(x: &'a str) -> &'static str"), "fn f<'a>(x: &'a str) -> &'static str");
        assert_eq!(code("'é' 'a"), "     'a");
    }

    #[test]
    fn unfinished_text_is_read_to_its_end() {
        for text in ["\"abc", "/* abc", "r#\"abc", "'", "'\\", "\"\\", "#[cfg(test)] mod t {", "use a::{b", "a::"] {
            let seen = code(text);
            without_tests(&seen);
            paths("src/a.rs", &seen);
        }
    }

    #[test]
    fn tests_are_blanked_whole() {
        let text = "fn a() {}\n#[cfg(test)]\nmod tests {\n fn b() { c(\"}\") }\n}\n\
            fn d() {}\n#[cfg(test)]\nmod e;\nfn f() {}";
        let seen = without_tests(&code(text));
        assert_eq!(seen.split_whitespace().collect::<String>(), "fna(){}fnd(){}fnf(){}");
        assert_eq!(seen.lines().count(), text.lines().count());
    }

    #[test]
    fn modules_of_tests_are_named() {
        let text = "#[cfg(test)]\nmod fake;\nmod real;\n#[cfg(test)]\n#[path = \"b.rs\"]\npub(crate) mod b;\n\
            #[cfg(test)] mod c { mod d; }";
        assert_eq!(test_modules(&code(text)), ["fake", "b"]);
    }

    #[test]
    fn words_are_whole_words() {
        assert_eq!(find_words("unsafe_code unsafe", "unsafe", false), [12]);
        assert_eq!(find_words("disk.write_at disk.writer mydisk.write", "disk.write", true), [0, 14]);
        assert_eq!(find_words("a.todo!() todo!()", "todo!", false), [2, 10]);
    }

    fn named(file: &str, text: &str) -> Vec<String> {
        paths(file, &code(text)).iter().map(Named::text).collect()
    }

    #[test]
    fn groups_are_taken_apart() {
        let text = "use a::{b, c::{self, d as e}, f::*};\nfn g() -> h::I<j::K> { l.m() }";
        assert_eq!(named("src/x.rs", text), ["a::b", "a::c::self", "a::c::d", "a::f", "h::I", "j::K"]);
    }

    #[test]
    fn relative_paths_are_resolved() {
        let text = "use super::super::migrate::link; use super::wire; use self::b::c; use blockferry::disk::Disk;";
        let expected = ["crate::migrate::link", "crate::nbd::wire", "crate::nbd::server::b::c", "crate::disk::Disk"];
        assert_eq!(named("src/nbd/server.rs", text), expected);
        assert_eq!(
            named("src/nbd/mod.rs", "use super::disk; use self::wire::A;"),
            ["crate::disk", "crate::nbd::wire::A"]
        );
        assert_eq!(named("src/lib.rs", "use self::cli::run;"), ["crate::cli::run"]);
    }

    #[test]
    fn decimals_are_read_with_their_types() {
        let values: Vec<u64> =
            decimals("4096 4_096u64 0x1000 a1024 1024usize 7 1.5").iter().map(|found| found.0).collect();
        assert_eq!(values, [4096, 4096, 1024, 7, 1, 5]);
    }
}
