// CLIP's byte-pair encoding, from its list of merges ("a b", the most frequent first).

function byteNames() {   // a printable character for each byte, in the vocabulary's order
  const printable = b => b >= 33 && b <= 126 || b >= 161 && b <= 172 || b >= 174;
  const all = [...Array(256).keys()];
  const plain = all.filter(printable), other = all.filter(b => !printable(b));
  const names = new Map(plain.map(b => [b, String.fromCharCode(b)]));
  other.forEach((b, i) => names.set(b, String.fromCharCode(256 + i)));
  return names;
}

const WORDS = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/giu;

export class Tokenizer {
  constructor(merges) {
    this.names = byteNames();
    this.rank = new Map(merges.map((pair, i) => [pair, i]));
    const bytes = [...this.names.values()];
    const whole = merges.map(pair => pair.replace(' ', ''));
    const words = [...bytes, ...bytes.map(c => `${c}</w>`), ...whole, '<start>', '<end>'];
    this.id = new Map(words.map((word, i) => [word, i]));
    this.end = words.length - 1;
  }

  joined(parts, pair) {
    const found = [];
    for (let i = 0; i < parts.length; i++) {
      if (`${parts[i]} ${parts[i + 1]}` !== pair) found.push(parts[i]);
      else found.push(parts[i] + parts[++i]);
    }
    return found;
  }

  pieces(word) {   // of one word: the pair that was merged first is merged first
    const names = [...new TextEncoder().encode(word)].map(b => this.names.get(b));
    let parts = [...names.slice(0, -1), `${names.at(-1)}</w>`];
    for (;;) {
      let best = Infinity, found = '';
      for (let i = 0; i + 1 < parts.length; i++) {
        const pair = `${parts[i]} ${parts[i + 1]}`, rank = this.rank.get(pair) ?? Infinity;
        if (rank < best) [best, found] = [rank, pair];
      }
      if (best === Infinity) return parts;
      parts = this.joined(parts, found);
    }
  }

  split(text) {   // [{text, id}]
    const straight = text.replace(/[\u02bc\u2018-\u201b]/g, "'").replace(/[\u201c-\u201f]/g, '"');
    const words = straight.replace(/\s+/gu, ' ').trim().toLowerCase().match(WORDS) ?? [];
    const parts = words.flatMap(word => this.pieces(word));
    return parts.map(part => ({ text: part.replace('</w>', ''), id: this.id.get(part) }));
  }

  encode(text) { return this.split(text).map(piece => piece.id); }
}
