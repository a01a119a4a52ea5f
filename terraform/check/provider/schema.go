package main

import (
	"fmt"
	"sort"

	"github.com/hashicorp/terraform-plugin-go/tfprotov6"
	"github.com/hashicorp/terraform-plugin-go/tftypes"
)

// provider is schema.json.
type provider struct {
	Address   string           `json:"address"`
	Provider  block            `json:"provider"`
	Resources map[string]block `json:"resources"`
	Data      map[string]block `json:"data"`
}

type block struct {
	Attributes map[string]attribute `json:"attributes"`
	Blocks     map[string]nested    `json:"blocks"`
}

type attribute struct {
	// Type is "string", "number", "bool", "dynamic", "list", "set", "map" or "nested-single", "nested-list", "nested-set".
	Type string `json:"type"`
	// Element is the type of a collection's elements.
	Element  *attribute `json:"element"`
	Nested   *block     `json:"nested"`
	Required bool       `json:"required"`
	Optional bool       `json:"optional"`
	Computed bool       `json:"computed"`
}

type nested struct {
	// Nesting is "single", "list" or "set".
	Nesting string `json:"nesting"`
	// Required is whether there has to be one.
	Required bool `json:"required"`
	// One is whether there may be one only.
	One   bool  `json:"one"`
	Block block `json:"block"`
}

func (p provider) response() (*tfprotov6.GetProviderSchemaResponse, error) {
	own, err := p.Provider.schema()
	if err != nil {
		return nil, fmt.Errorf("provider: %w", err)
	}
	answer := &tfprotov6.GetProviderSchemaResponse{
		ServerCapabilities: &tfprotov6.ServerCapabilities{},
		Provider:           own,
	}
	if answer.ResourceSchemas, err = schemas(p.Resources); err != nil {
		return nil, err
	}
	answer.DataSourceSchemas, err = schemas(p.Data)
	return answer, err
}

func schemas(from map[string]block) (map[string]*tfprotov6.Schema, error) {
	to := map[string]*tfprotov6.Schema{}
	for name, described := range from {
		schema, err := described.schema()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		to[name] = schema
	}
	return to, nil
}

func (b block) schema() (*tfprotov6.Schema, error) {
	made, err := b.protocol()
	return &tfprotov6.Schema{Block: made}, err
}

func (b block) protocol() (*tfprotov6.SchemaBlock, error) {
	attributes, err := b.attributes()
	if err != nil {
		return nil, err
	}
	made := &tfprotov6.SchemaBlock{Attributes: attributes}
	for _, name := range names(b.Blocks) {
		one, err := b.Blocks[name].protocol(name)
		if err != nil {
			return nil, fmt.Errorf("block %s: %w", name, err)
		}
		made.BlockTypes = append(made.BlockTypes, one)
	}
	return made, nil
}

func (b block) attributes() ([]*tfprotov6.SchemaAttribute, error) {
	var made []*tfprotov6.SchemaAttribute
	for _, name := range names(b.Attributes) {
		one, err := b.Attributes[name].protocol(name)
		if err != nil {
			return nil, fmt.Errorf("attribute %s: %w", name, err)
		}
		made = append(made, one)
	}
	return made, nil
}

func (a attribute) protocol(name string) (*tfprotov6.SchemaAttribute, error) {
	made := &tfprotov6.SchemaAttribute{Name: name, Required: a.Required, Optional: a.Optional, Computed: a.Computed}
	nesting, isNested := map[string]tfprotov6.SchemaObjectNestingMode{
		"nested-single": tfprotov6.SchemaObjectNestingModeSingle,
		"nested-list":   tfprotov6.SchemaObjectNestingModeList,
		"nested-set":    tfprotov6.SchemaObjectNestingModeSet,
	}[a.Type]
	if !isNested {
		var err error
		made.Type, err = a.tftype()
		return made, err
	}
	attributes, err := a.Nested.attributes()
	made.NestedType = &tfprotov6.SchemaObject{Attributes: attributes, Nesting: nesting}
	return made, err
}

func (a attribute) tftype() (tftypes.Type, error) {
	simple := map[string]tftypes.Type{"string": tftypes.String, "number": tftypes.Number, "bool": tftypes.Bool, "dynamic": tftypes.DynamicPseudoType}
	if made, ok := simple[a.Type]; ok {
		return made, nil
	}
	if a.Type == "object" {
		return a.Nested.object()
	}
	if a.Element == nil {
		return nil, fmt.Errorf("no type is called %q", a.Type)
	}
	element, err := a.Element.tftype()
	if err != nil {
		return nil, err
	}
	switch a.Type {
	case "list":
		return tftypes.List{ElementType: element}, nil
	case "set":
		return tftypes.Set{ElementType: element}, nil
	case "map":
		return tftypes.Map{ElementType: element}, nil
	}
	return nil, fmt.Errorf("no collection is called %q", a.Type)
}

func (b block) object() (tftypes.Type, error) {
	made := tftypes.Object{AttributeTypes: map[string]tftypes.Type{}}
	for name, one := range b.Attributes {
		kind, err := one.tftype()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		made.AttributeTypes[name] = kind
	}
	return made, nil
}

func (n nested) protocol(name string) (*tfprotov6.SchemaNestedBlock, error) {
	inner, err := n.Block.protocol()
	made := &tfprotov6.SchemaNestedBlock{TypeName: name, Block: inner}
	switch n.Nesting {
	case "single":
		made.Nesting = tfprotov6.SchemaNestedBlockNestingModeSingle
		return made, err
	case "set":
		made.Nesting = tfprotov6.SchemaNestedBlockNestingModeSet
	default:
		made.Nesting = tfprotov6.SchemaNestedBlockNestingModeList
	}
	if n.Required {
		made.MinItems = 1
	}
	if n.One {
		made.MaxItems = 1
	}
	return made, err
}

func names[T any](of map[string]T) []string {
	var made []string
	for name := range of {
		made = append(made, name)
	}
	sort.Strings(made)
	return made
}
