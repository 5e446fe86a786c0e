package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// formatVerb is what a message has in the place of what differs.
var formatVerb = regexp.MustCompile(`%[-+# 0]*[0-9.*]*[a-zA-Z]`)

// messagesOf returns the texts that the sources of a module have, with an ellipsis for
// each format verb. Texts that are put together of several count as one.
func messagesOf(t *testing.T, root string) (texts []string) {
	t.Helper()
	files := token.NewFileSet()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(files, path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			e, ok := n.(ast.Expr)
			if !ok {
				return true
			}
			text, ok := textOf(e)
			if ok && len(text) > 3 {
				texts = append(texts, formatVerb.ReplaceAllString(text, "…"))
			}
			return !ok
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return texts
}

// textOf returns the text of a constant expression, with a verb for what is none in it.
func textOf(e ast.Expr) (text string, ok bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		if e.Kind != token.STRING {
			return "", false
		}
		text, err := strconv.Unquote(e.Value)
		return text, err == nil
	case *ast.BinaryExpr:
		left, okLeft := textOf(e.X)
		right, okRight := textOf(e.Y)
		if e.Op != token.ADD || !okLeft && !okRight {
			return "", false
		}
		if !okLeft {
			left = "%s"
		}
		if !okRight {
			right = "%s"
		}
		return left + right, true
	}
	return "", false
}

var quotedMessage = regexp.MustCompile("(?m)^\\| `([^`]+)` \\|")

// Each message that docs/troubleshooting.md explains is one that lazyvol has.
func TestMessagesOfTheTroubleshootingPageExist(t *testing.T) {
	page, err := os.ReadFile("../../docs/troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	texts := strings.Join(messagesOf(t, "../.."), "\x00")
	quoted := quotedMessage.FindAllStringSubmatch(string(page), -1)
	if len(quoted) < 60 {
		t.Errorf("only %d messages were found on the page", len(quoted))
	}
	for _, m := range quoted {
		if !strings.Contains(texts, m[1]) {
			t.Errorf("nothing says %q any more", m[1])
		}
	}
}

// What is refused by state, not found or failed for a reason that has a name is explained
// on the page. A wrong command line explains itself.
func TestNamedFailuresAreOnTheTroubleshootingPage(t *testing.T) {
	page, err := os.ReadFile("../../docs/troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	explained := string(page)
	for _, v := range verdicts {
		if v.exit == exitUsage || v.exit == exitInterrupted || v.err == errRefused {
			continue
		}
		messages := strings.Split(v.err.Error(), ": ")
		if reason := messages[len(messages)-1]; !strings.Contains(explained, reason) {
			t.Errorf("%q is not explained", reason)
		}
	}
}
