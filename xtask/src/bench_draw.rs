//! Pictures of results: bars in SVG, by hand.
//!
//! A row's name is `group  name`, with at least two blanks between: the rows of a group stand together, and their bars
//! are drawn against the longest of the group.

use crate::bench::Table;
use std::fmt::Write;

const LINE: usize = 16;
const NAME: usize = 250;
const PANEL: usize = 260;
const BAR: usize = 170;
const TOP: usize = 44;
const OURS: &str = "#1f6f8b";
const THEIRS: &str = "#b9c3c9";

/// Draws the columns with these keys.
pub(crate) fn svg(table: &Table, keys: &[&str]) -> String {
    let panels: Vec<usize> =
        keys.iter().filter_map(|key| table.columns.iter().position(|column| column.key == *key)).collect();
    let groups = grouped(table);
    let lines: usize = groups.iter().map(|(_, rows)| rows.len() + 2).sum();
    let (width, height) = (NAME + panels.len() * PANEL + 20, TOP + lines * LINE + 10);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} \
         {height}\" font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"{width}\" height=\"{height}\" \
         fill=\"#ffffff\"/>\n"
    );
    text(&mut out, 10, 18, "start", "bold", &table.title);
    for (panel, column) in panels.iter().enumerate() {
        text(&mut out, NAME + panel * PANEL, 36, "start", "bold", table.columns[*column].title);
    }
    let mut y = TOP + LINE;
    for (group, rows) in groups {
        text(&mut out, 10, y, "start", "bold", &group);
        y += LINE;
        for (name, numbers) in &rows {
            text(&mut out, NAME - 8, y, "end", "normal", name);
            for (panel, column) in panels.iter().enumerate() {
                let most = rows.iter().filter_map(|row| row.1[*column]).fold(0.0, f64::max);
                let Some(number) = numbers[*column] else { continue };
                let x = NAME + panel * PANEL;
                let length = if most > 0.0 { number / most * crate::demo::real(BAR as u64) } else { 0.0 };
                let colour = if name.starts_with("blockferry") || !has_peers(&rows) { OURS } else { THEIRS };
                let _ = writeln!(
                    out,
                    "<rect x=\"{x}\" y=\"{}\" width=\"{length:.1}\" height=\"{}\" fill=\"{colour}\"/>",
                    y - 10,
                    LINE - 4
                );
                let shown = format!("{number:.*}", table.columns[*column].digits);
                let _ = writeln!(
                    out,
                    "<text x=\"{:.1}\" y=\"{y}\">{shown}</text>",
                    length + crate::demo::real(x as u64) + 4.0
                );
            }
            y += LINE;
        }
        y += LINE;
    }
    out.push_str("</svg>\n");
    out
}

type Row<'a> = (&'a str, &'a [Option<f64>]);

fn grouped(table: &Table) -> Vec<(String, Vec<Row<'_>>)> {
    let mut groups: Vec<(String, Vec<Row<'_>>)> = Vec::new();
    for (name, numbers) in &table.rows {
        let (group, name) =
            name.split_once("  ").map_or(("", name.trim()), |(group, name)| (group.trim(), name.trim()));
        match groups.last_mut() {
            Some((last, rows)) if last == group => rows.push((name, numbers)),
            _ => groups.push((group.to_owned(), vec![(name, numbers)])),
        }
    }
    groups
}

/// Whether somebody else is compared with.
fn has_peers(rows: &[Row<'_>]) -> bool {
    rows.iter().any(|row| row.0.starts_with("blockferry"))
}

fn text(out: &mut String, x: usize, y: usize, anchor: &str, weight: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(out, "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\" font-weight=\"{weight}\">{words}</text>");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Column;

    #[test]
    fn the_bars_of_a_group_are_drawn_against_its_longest() {
        const COLUMNS: &[Column] =
            &[Column { key: "iops", title: "IOPS", digits: 0 }, Column { key: "left_out", title: "-", digits: 0 }];
        let row = |name: &str, number| (name.to_owned(), vec![number, Some(1.0)]);
        let rows = vec![
            row("a <b>   blockferry", Some(50.0)),
            row("a <b>   other", Some(100.0)),
            row("c  blockferry", Some(7.0)),
            row("c  other", None),
        ];
        let picture = svg(&Table { title: "T".to_owned(), columns: COLUMNS, rows, notes: Vec::new() }, &["iops"]);
        assert_eq!(picture.matches("width=\"85.0\"").count(), 1, "half of the longest");
        assert_eq!(picture.matches("width=\"170.0\"").count(), 2, "the longest of each group");
        assert_eq!(picture.matches(OURS).count(), 2);
        assert!(picture.contains("a &lt;b&gt;") && picture.ends_with("</svg>\n"));
    }
}
