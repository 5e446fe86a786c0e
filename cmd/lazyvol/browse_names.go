package main

import (
	"crypto/sha256"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/lazyvol/lazyvol/manifest"
)

// maxFileName is how long a name may be on Linux, in bytes.
const maxFileName = 255

// What a tag's name begins with, or ends with, where its bytes alone do not do. A
// percent sign that stands for itself is %25, so that no other name can look like it.
const (
	emptyName = "%empty"
	cutMark   = "%~" // before the hash of a name of which this is the beginning
)

// fileName returns a file name for a tag's key or value: itself if it can be one, and
// no two the same. Bytes as in URLs (%2F) stand for what cannot be part of a name,
// does more to a terminal than be shown, or makes a name hidden, or an option, where it
// comes first. One that is too long ends with a hash of all of it.
func fileName(s string) string {
	if s == "" {
		return emptyName
	}
	var name strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		plain := unicode.IsPrint(r) && !(r == utf8.RuneError && n == 1) && r != '/' && r != '%'
		if plain && !(i == 0 && (r == '.' || r == '-')) {
			name.WriteString(s[i : i+n])
		} else {
			for _, b := range []byte(s[i : i+n]) {
				fmt.Fprintf(&name, "%%%02X", b)
			}
		}
		i += n
	}
	if name.Len() <= maxFileName {
		return name.String()
	}
	sum := sha256.Sum256([]byte(s))
	end := fmt.Sprintf("%s%x", cutMark, sum[:16])
	return wholeStart(name.String(), maxFileName-len(end)) + end
}

// wholeStart returns at most n bytes of an escaped name, no character or escape cut in two.
func wholeStart(name string, n int) string {
	start := name[:n]
	if i := strings.LastIndexByte(start, '%'); i > n-len("%2F") {
		start = start[:i]
	}
	for !utf8.ValidString(start) {
		start = start[:len(start)-1]
	}
	return start
}

// imageName is the name of a snapshot's image, the same for ever.
func imageName(id manifest.SnapshotID) string { return id.String() + ".img" }

// timeName is a name of a snapshot's image that sorts by when it was made.
func timeName(at time.Time, id manifest.SnapshotID) string {
	return at.UTC().Format("2006-01-02T15-04-05.000Z") + "_" + imageName(id)
}
