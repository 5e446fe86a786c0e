package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/BurntSushi/toml"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// maxConfig bounds a configuration file, in bytes.
const maxConfig = 1 << 20

// systemConfig is root's configuration file.
const systemConfig = "/etc/lazyvol/config.toml"

// A configFile is a configuration that was checked. The zero configFile is empty.
type configFile struct {
	name     string
	settings map[string]setting // by path and flag, as settingKey has them
}

// A setting is one key of a file.
type setting struct {
	file  string
	line  int
	value any // as TOML has it
}

func settingKey(path, flag string) string { return path + "\x00" + flag }

func (f *configFile) find(path, flag string) (setting, bool) {
	s, ok := f.settings[settingKey(path, flag)]
	return s, ok
}

func (s setting) origin() origin { return origin(s.file + ":" + strconv.Itoa(s.line)) }

// defaultConfig returns the file that is read if none is named, "" if it is not there.
func defaultConfig() (string, error) {
	name := systemConfig
	if os.Geteuid() != 0 {
		dir, err := os.UserConfigDir() // $XDG_CONFIG_HOME, or ~/.config
		if err != nil {
			return "", nil // without a home there is none
		}
		name = filepath.Join(dir, "lazyvol", "config.toml")
	}
	there, err := fileExists(name)
	if err != nil {
		return "", usageError{fmt.Errorf("look for a configuration: %w (--config '' reads none)", err)}
	}
	if !there {
		return "", nil
	}
	return name, nil
}

// readConfig reads and checks a configuration file. What is wrong with it is a usage
// error that names each place.
func readConfig(name string) (*configFile, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0) // of a pipe no writer is waited for
	if err != nil {
		return nil, usageError{fmt.Errorf("read the configuration: %w", err)}
	}
	defer f.Close()
	if err := checkCustody(f, os.Geteuid()); err != nil {
		return nil, usageError{err}
	}
	data, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err != nil {
		return nil, usageError{fmt.Errorf("read the configuration: %w", err)}
	}
	if len(data) > maxConfig {
		return nil, usageError{fmt.Errorf("%s: it is larger than %s", name, size(maxConfig))}
	}
	return parseConfig(name, data)
}

// checkCustody refuses a file that somebody else may write: it can name commands that
// are run (on-event), and where disks are stored.
func checkCustody(f *os.File, user int) error {
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("read the configuration: %w", err)
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("%s: it does not tell whose it is", f.Name())
	}
	switch mode := info.Mode().Perm(); {
	case info.IsDir():
		return fmt.Errorf("%s: it is a directory", f.Name())
	case !info.Mode().IsRegular(): // a pipe can be read once, and some commands read it twice
		return fmt.Errorf("%s: it is no regular file (--config '' reads none)", f.Name())
	case st.Uid != 0 && int(st.Uid) != user:
		return fmt.Errorf("%s: it belongs to user %d, and a configuration must belong to root or to who uses it", f.Name(), st.Uid)
	case mode&0o002 != 0:
		return fmt.Errorf("%s: everybody may write it; chmod o-w it", f.Name())
	case mode&0o020 != 0 && user == 0 && st.Gid != 0:
		return fmt.Errorf("%s: group %d may write it, and root is to use it; chmod g-w it", f.Name(), st.Gid)
	}
	return nil
}

// parseConfig checks a configuration: each key names a flag, and has a value that the
// flag takes.
func parseConfig(name string, data []byte) (*configFile, error) {
	var all map[string]toml.Primitive
	meta, err := toml.Decode(string(data), &all)
	if err != nil {
		var syntax toml.ParseError
		if errors.As(err, &syntax) {
			err = fmt.Errorf("%s:%d: %s", name, syntax.Position.Line, syntax.Message)
		} else {
			err = fmt.Errorf("%s: %w", name, err)
		}
		return nil, usageError{err}
	}
	// A tree of its own: its flags take values to see whether they can.
	root := (&app{memory: defaultMemory, keys: newSecretKeys()}).command()
	p := configParser{name: name, meta: &meta, file: &configFile{name: name, settings: make(map[string]setting)}}
	p.table(root, nil, all)
	if p.faults > maxFaults {
		p.failed = errors.Join(p.failed, fmt.Errorf("%s: and %d more", name, p.faults-maxFaults))
	}
	if p.failed != nil {
		return nil, usageError{p.failed}
	}
	return p.file, nil
}

// maxFaults is how many places are named that are wrong: a file with more is another
// program's.
const maxFaults = 20

// A configParser takes what was decoded for settings.
type configParser struct {
	name   string
	meta   *toml.MetaData
	file   *configFile
	failed error // what is wrong, the first maxFaults places
	faults int   // places
}

func (p *configParser) fail(at toml.Primitive, format string, args ...any) {
	if p.faults++; p.faults <= maxFaults {
		p.failed = errors.Join(p.failed, fmt.Errorf("%s:%d: %w", p.name, p.lineOf(at), fmt.Errorf(format, args...)))
	}
}

// table takes the table of the command c, whose key is given.
func (p *configParser) table(c *cobra.Command, key toml.Key, table map[string]toml.Primitive) {
	for _, word := range sortedKeys(table) {
		key := append(key[:len(key):len(key)], word)
		if sub := subcommand(c, word); sub != nil {
			if below := p.below(table[word]); below != nil {
				p.table(sub, key, below)
				continue
			}
			p.fail(table[word], "%s is a command: its flags go into a table, [%s]", word, key)
			continue
		}
		p.flag(c, key, word, table[word])
	}
}

// below is what is in a table; nil if it is none.
func (p *configParser) below(at toml.Primitive) (table map[string]toml.Primitive) {
	if p.meta.PrimitiveDecode(at, &table) != nil {
		return nil
	}
	return table
}

// flag takes one key.
func (p *configParser) flag(c *cobra.Command, key toml.Key, name string, at toml.Primitive) {
	f := settable(c).Lookup(name)
	switch why := commandLineOnly[name]; {
	case f == nil || f.Hidden:
		p.fail(at, "unknown key %q%s", key.String(), didYouMean(p.nearest(c, name)))
		return
	case why != "":
		p.fail(at, "%s can be given on the command line only: %s", name, why)
		return
	}
	s := setting{file: p.name, line: p.lineOf(at)}
	err := p.meta.PrimitiveDecode(at, &s.value)
	var values []string
	if err == nil {
		values, err = s.values(f)
	}
	for _, v := range values {
		if err == nil {
			err = f.Value.Set(v)
		}
	}
	if err != nil {
		p.fail(at, "%s: %w", key, err)
		return
	}
	p.file.settings[settingKey(commandPath(c), name)] = s
}

// nearest returns what an unknown key may have been meant to be.
func (p *configParser) nearest(c *cobra.Command, name string) []string {
	var known []string
	settable(c).VisitAll(func(f *pflag.Flag) {
		if !f.Hidden && commandLineOnly[f.Name] == "" {
			known = append(known, f.Name)
		}
	})
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() {
			known = append(known, sub.Name())
		}
	}
	return nearest(name, known)
}

// settable are the flags that the table of a command sets: its own.
func settable(c *cobra.Command) *pflag.FlagSet {
	if !c.HasParent() {
		return c.PersistentFlags()
	}
	return c.LocalFlags()
}

func subcommand(c *cobra.Command, word string) *cobra.Command {
	for _, sub := range c.Commands() {
		if sub.Name() == word && sub.IsAvailableCommand() {
			return sub
		}
	}
	return nil
}

// values returns what a flag is set to by a value of TOML: several if it may be
// repeated.
func (s setting) values(f *pflag.Flag) ([]string, error) {
	if list, ok := s.value.([]any); ok && isRepeatable(f) {
		values := make([]string, len(list))
		for i, v := range list {
			text, ok := v.(string)
			if !ok {
				return nil, fmt.Errorf("an array of strings is wanted, and %s is none", describeTOML(v))
			}
			values[i] = text
		}
		return values, nil
	}
	kind := f.Value.Type()
	number := strings.HasPrefix(kind, "int") || strings.HasPrefix(kind, "uint")
	switch v := s.value.(type) {
	case bool:
		if kind == "bool" {
			return []string{strconv.FormatBool(v)}, nil
		}
	case int64:
		if number || kind == "size" {
			return []string{strconv.FormatInt(v, 10)}, nil
		}
	case string:
		if kind != "bool" && !number {
			return []string{v}, nil
		}
	}
	return nil, fmt.Errorf("%s is wanted, and %s is none", wantedTOML(f), describeTOML(s.value))
}

// wantedTOML names the type of TOML that a flag takes.
func wantedTOML(f *pflag.Flag) string {
	kind := f.Value.Type()
	switch {
	case kind == "bool":
		return "true or false"
	case strings.HasPrefix(kind, "int"), strings.HasPrefix(kind, "uint"):
		return "a number"
	case kind == "size":
		return `a size like "512MiB"`
	case kind == "duration":
		return `a time like "60s"`
	case isRepeatable(f):
		return "a string, or an array of strings,"
	}
	return "a string"
}

func describeTOML(v any) string {
	switch v := v.(type) {
	case string:
		return strconv.Quote(v)
	case map[string]any:
		return "a table"
	case []any, []map[string]any:
		return "an array"
	default:
		return fmt.Sprint(v)
	}
}

// lineOf returns the line on which a key is defined, from 1. One that only others tell of,
// as a of a.b, is on the first of theirs.
func (p *configParser) lineOf(at toml.Primitive) (line int) {
	var refused toml.ParseError
	if errors.As(p.meta.PrimitiveDecode(at, new(nothing)), &refused) {
		line = refused.Position.Line
	}
	if line > 0 {
		return line
	}
	for _, sub := range p.below(at) {
		if n := p.lineOf(sub); line == 0 || n < line {
			line = n
		}
	}
	return line
}

// nothing takes no value: what is decoded into it is refused, and the decoder then says
// where it is.
type nothing struct{}

// UnmarshalTOML implements [toml.Unmarshaler].
func (*nothing) UnmarshalTOML(any) error { return errors.New("it is not taken") }
