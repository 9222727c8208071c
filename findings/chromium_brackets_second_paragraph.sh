#!/usr/bin/env bash
# Chromium 156 (Debian's package): in a block whose paragraphs each find their own direction
# (unicode-bidi: plaintext), brackets in a second paragraph are turned by the direction of the first.
#
# Seen: the right-to-left paragraph "שלום (the) cat" alone puts "(" to the right of "the", as rule N0
# of Unicode's bidirectional algorithm says. The same paragraph as the second one of a block that
# begins with "dog" puts "(" to the left of "the", although rule P1 treats each paragraph by itself.
# A <textarea> with the same text does it right, so a coloured copy under it shows other brackets
# than the field. One block for each paragraph is the way around it.
#
# The script needs chromium (apt-get install chromium), and fails if that changes.
set -eu
program=$(command -v chromium || command -v chromium-browser || command -v google-chrome)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/page.html" <<'PAGE'
<meta charset="utf-8">
<style>div { white-space: pre-wrap; unicode-bidi: plaintext }</style>
<div>שלום (the) cat</div><div>dog
שלום (the) cat</div><pre id="result"></pre>
<script>
const left = (text, n) => {
  const range = document.createRange();
  range.setStart(text, n);
  range.setEnd(text, n + 1);
  return range.getBoundingClientRect().left;
};
const place = ({ firstChild: text }) => {
  const bracket = text.data.indexOf("(");
  return left(text, bracket) > left(text, bracket + 1) ? "right of the word" : "left of the word";
};
document.getElementById("result").textContent = "the bracket alone: " + [
  ...document.querySelectorAll("div")].map(place).join("; in a second paragraph: ");
</script>
PAGE
"$program" --version 2> /dev/null
timeout 60 "$program" --headless --no-sandbox --disable-gpu --user-data-dir="$folder/profile" \
  --dump-dom "file://$folder/page.html" 2> /dev/null |
  grep -o "the bracket alone: right of the word; in a second paragraph: left of the word"
